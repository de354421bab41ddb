// int8 attention with register rows for processors with AVX2 and no VNNI: what fused_ops.cpp computes with VNNI, by the exact
// tile of avx2.h. Its plain form is int8_attention_reference in kernels/fused_ops.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "attention.h"
#include "avx2.h"

namespace {

using namespace regcache;

float largest(__m256 x) {
  alignas(32) float values[8];
  _mm256_store_ps(values, x);
  return *std::max_element(values, values + 8);
}

__m256 size_of(const float* x) { return _mm256_andnot_ps(all(-0.0f), _mm256_loadu_ps(x)); }

// s8 codes of a row that is filled up to a multiple of 8
void round_row(const float* x, float inverse, int64_t width, int32_t* codes) {
  for (int64_t i = 0; i < width; i += 8)
    _mm256_storeu_si256((__m256i*)(codes + i), _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), all(inverse))));
}

// A matrix as panels of 16 columns for `tile`: w[row][column] goes to [column / 16][row / 2][column % 16][row % 2].
struct Panels {
  int64_t pairs, columns;
  std::vector<int8_t> bytes;
  std::vector<float> scale;  // of each column
  Panels(int64_t rows, int64_t columns)
      : pairs((rows + 1) / 2), columns(round_up(columns, kColumns)), bytes(this->columns * pairs * 2), scale(this->columns) {}
  void set_column(int64_t column, const int32_t* codes, int64_t rows) {
    int8_t* to = bytes.data() + (column / kColumns * pairs * kColumns + column % kColumns) * 2;
    for (int64_t i = 0; i < rows; ++i) to[i / 2 * 2 * kColumns + i % 2] = int8_t(codes[i]);
  }
  void set_row(int64_t row, const int32_t* codes) {  // codes of all columns
    for (int64_t first = 0; first < columns; first += kColumns) {
      int8_t* to = bytes.data() + first * pairs * 2 + row / 2 * 2 * kColumns + row % 2;
      for (int64_t c = 0; c < kColumns; ++c) to[2 * c] = int8_t(codes[first + c]);
    }
  }
  const int8_t* panel(int64_t column) const { return bytes.data() + column * pairs * 2; }
};

struct Head {
  int64_t tokens, width, padded;  // padded: width up to a multiple of 16
  Panels keys, values;            // columns: tokens; channels
  std::vector<float> row, logits, result;
  std::vector<int16_t> query, probabilities;
  std::vector<int32_t> codes;
  Head(int64_t tokens, int64_t width)
      : tokens(tokens), width(width), padded(round_up(width, kColumns)), keys(width, tokens), values(tokens, width), row(padded),
        logits(kRows * keys.columns), result(kRows * padded), query(kRows * 2 * keys.pairs), probabilities(kRows * 2 * values.pairs),
        codes(std::max(padded, keys.columns)) {}

  // keys: one scale per token
  void pack_keys(const float* key, int64_t stride) {
    for (int64_t j = 0; j < tokens; ++j) {
      std::copy_n(key + j * stride, width, row.data());
      __m256 best = all(1e-30f);
      for (int64_t i = 0; i < padded; i += 8) best = _mm256_max_ps(best, size_of(row.data() + i));
      const float top = largest(best);
      keys.scale[j] = top / 127.0f;
      round_row(row.data(), 127.0f / top, padded, codes.data());
      keys.set_column(j, codes.data(), width);
    }
  }

  // values: one scale per channel
  void pack_values(const float* value, int64_t stride) {
    float best[kMaxWidth], inverse[kMaxWidth];
    std::fill_n(best, padded, 1e-30f);
    for (int64_t j = 0; j < tokens; ++j)
      for (int64_t i = 0; i < width; ++i) best[i] = std::max(best[i], std::fabs(value[j * stride + i]));
    for (int64_t i = 0; i < width; ++i) values.scale[i] = best[i] / 127.0f, inverse[i] = 127.0f / best[i];
    for (int64_t j = 0; j < tokens; ++j) {
      for (int64_t i = 0; i < width; ++i) row[i] = value[j * stride + i] * inverse[i];
      round_row(row.data(), 1.0f, padded, codes.data());
      values.set_row(j, codes.data());
    }
  }

  // one scale per query, which only scales the logits of its row
  float round_query(const float* q, int64_t r) {
    std::copy_n(q, width, row.data());
    __m256 best = all(1e-30f);
    for (int64_t i = 0; i < padded; i += 8) best = _mm256_max_ps(best, size_of(row.data() + i));
    const float top = largest(best);
    round_row(row.data(), 127.0f / top, padded, codes.data());
    for (int64_t i = 0; i < width; ++i) query[r * 2 * keys.pairs + i] = int16_t(codes[i]);
    return top / 127.0f;
  }

  // u8 probabilities relative to the largest logit of an image token; returns the sum of their codes
  float softmax(int64_t r, float& top) {
    float* x = logits.data() + r * keys.columns;
    std::fill(x + tokens, x + keys.columns, -INFINITY);
    __m256 best = all(-INFINITY);
    for (int64_t j = 0; j < keys.columns; j += 8) best = _mm256_max_ps(best, _mm256_loadu_ps(x + j));
    top = largest(best);
    for (int64_t j = 0; j < keys.columns; j += 8) {
      const __m256 p = _mm256_mul_ps(exp(_mm256_sub_ps(_mm256_loadu_ps(x + j), all(top))), all(255.0f));
      _mm256_storeu_si256((__m256i*)(codes.data() + j), _mm256_cvtps_epi32(p));
    }
    int32_t total = 0;
    int16_t* p = probabilities.data() + r * 2 * values.pairs;
    for (int64_t j = 0; j < tokens; ++j) p[j] = int16_t(codes[j]), total += codes[j];
    return float(total);
  }
};

struct Output {
  float* real = nullptr;
  uint8_t* codes = nullptr;
  Quantizer quantizer{0.0, 0, 0};
};

void attend(const float* query, const float* key, const float* value, int64_t stride, int64_t head, float scaling, const Registers& g,
            const Output& out, int64_t out_offset, int64_t out_stride, Head& t) {
  const int64_t tokens = t.tokens, width = t.width;
  t.pack_keys(key, stride);
  t.pack_values(value, stride);
  alignas(32) int32_t sums[kRows * kColumns];
  float row_scale[kRows], mass[kRows][kMaxRegisters];
  for (int64_t first = 0; first < tokens; first += kRows) {
    const int64_t rows = std::min(kRows, tokens - first);
    for (int64_t r = 0; r < rows; ++r) row_scale[r] = scaling * t.round_query(query + (first + r) * stride, r);
    for (int64_t j = 0; j < t.keys.columns; j += kColumns) {
      tile(t.query.data(), 2 * t.keys.pairs, t.keys.panel(j), t.keys.pairs, sums);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < kColumns; ++c)
          t.logits[r * t.keys.columns + j + c] = float(sums[r * kColumns + c]) * t.keys.scale[j + c] * row_scale[r];
    }
    float inverse_total[kRows];
    for (int64_t r = 0; r < rows; ++r) {
      float top, total = t.softmax(r, top);
      for (int64_t n = 0; n < g.rows; ++n) {  // registers stay outside the range of the codes
        const float *q = query + (first + r) * stride, *k = g.key + (head * g.rows + n) * width;
        float dot = 0.0f;
        for (int64_t i = 0; i < width; ++i) dot += q[i] * k[i];
        mass[r][n] = 255.0f * std::exp(std::min(dot * scaling + g.bias - top, 69.0f));
        total += mass[r][n];
      }
      inverse_total[r] = 1.0f / total;
    }
    for (int64_t c = 0; c < t.padded; c += kColumns) {
      tile(t.probabilities.data(), 2 * t.values.pairs, t.values.panel(c), t.values.pairs, sums);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < kColumns; ++i)
          t.result[r * t.padded + c + i] = float(sums[r * kColumns + i]) * t.values.scale[c + i];
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* o = t.result.data() + r * t.padded;
      for (int64_t n = 0; n < g.rows; ++n) {
        const float* v = g.value + (head * g.rows + n) * width;
        for (int64_t i = 0; i < width; ++i) o[i] += mass[r][n] * v[i];
      }
      for (int64_t i = 0; i < width; ++i) o[i] *= inverse_total[r];
      const int64_t place = out_offset + (first + r) * out_stride;
      if (out.codes == nullptr) std::copy_n(o, width, out.real + place);
      else out.quantizer.row(o, out.codes + place, width);
    }
  }
}

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& register_key,
                     const std::optional<at::Tensor>& register_value, int64_t heads, double scaling, double logit_bias,
                     double inverse, int64_t zero_point, int64_t highest) {
  const int64_t batch = q.size(0), tokens = q.size(1), width = q.size(2) / heads;
  const Registers g = check_attention(q, k, v, register_key, register_value, heads, logit_bias);
  at::Tensor out = at::empty({batch, tokens, heads * width}, q.options().dtype(inverse > 0 ? at::kByte : at::kFloat));
  Output target;
  if (inverse > 0) target = {nullptr, out.data_ptr<uint8_t>(), Quantizer(inverse, zero_point, highest)};
  else target.real = out.data_ptr<float>();
  const float *qp = q.const_data_ptr<float>(), *kp = k.const_data_ptr<float>(), *vp = v.const_data_ptr<float>();
  at::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    Head scratch(tokens, width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / heads, h = task % heads, offset = b * q.stride(0) + h * width;
      attend(qp + offset, kp + offset, vp + offset, q.stride(1), h, float(scaling), g, target,
             b * tokens * heads * width + h * width, heads * width, scratch);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(regcache, CPU, m) { m.impl("attention", &attention); }
