// int8 attention with register rows in AVX2, by the exact tile of avx2.h. What surrounds the products is attention_loop.h.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "attention_loop.h"
#include "avx2.h"

namespace regcache {
namespace {

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

struct Avx2Head {
  static constexpr int64_t kRows = regcache::kRows;
  static constexpr double kPerNat = 1.0;
  static constexpr float kMost = 69.0f;

  int64_t tokens, width, padded;  // padded: width up to a multiple of 16
  Panels keys, values;            // columns: tokens; channels
  std::vector<float> row, logits, result;
  std::vector<int16_t> query, probabilities;
  std::vector<int32_t> codes;
  Avx2Head(int64_t tokens, int64_t width)
      : tokens(tokens), width(width), padded(round_up(width, kColumns)), keys(width, tokens), values(tokens, width), row(padded),
        logits(kRows * keys.columns), result(kRows * padded), query(kRows * 2 * keys.pairs),
        probabilities(kRows * 2 * values.pairs), codes(std::max(padded, keys.columns)) {}

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
      const __m256 p = _mm256_mul_ps(regcache::exp(_mm256_sub_ps(_mm256_loadu_ps(x + j), all(top))), all(255.0f));
      _mm256_storeu_si256((__m256i*)(codes.data() + j), _mm256_cvtps_epi32(p));
    }
    int32_t total = 0;
    int16_t* p = probabilities.data() + r * 2 * values.pairs;
    for (int64_t j = 0; j < tokens; ++j) p[j] = int16_t(codes[j]), total += codes[j];
    return float(total);
  }

  void multiply_keys(int64_t rows, const float* row_scale) {
    alignas(32) int32_t sums[kRows * kColumns];
    for (int64_t j = 0; j < keys.columns; j += kColumns) {
      tile(query.data(), 2 * keys.pairs, keys.panel(j), keys.pairs, sums);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < kColumns; ++c)
          logits[r * keys.columns + j + c] = float(sums[r * kColumns + c]) * keys.scale[j + c] * row_scale[r];
    }
  }

  void multiply_values(int64_t rows) {
    alignas(32) int32_t sums[kRows * kColumns];
    for (int64_t c = 0; c < padded; c += kColumns) {
      tile(probabilities.data(), 2 * values.pairs, values.panel(c), values.pairs, sums);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < kColumns; ++i) result[r * padded + c + i] = float(sums[r * kColumns + i]) * values.scale[c + i];
    }
  }

  void write(const Attention& a, int64_t r, const float* mass, const float* registers, float factor, int64_t place) {
    float* o = result.data() + r * padded;
    for (int64_t n = 0; n < a.registers; ++n)
      for (int64_t i = 0; i < width; ++i) o[i] += mass[n] * registers[n * width + i];
    for (int64_t i = 0; i < width; ++i) o[i] *= factor;
    if (a.real != nullptr) {
      std::copy_n(o, width, a.real + place);
    } else {
      quantize_values(o, a.out + place, width, a.codes);
    }
  }

  float dot(const float* x, const float* y) const {
    float sum = 0.0f;
    for (int64_t i = 0; i < width; ++i) sum += x[i] * y[i];
    return sum;
  }

  static float exp(float x) { return std::exp(x); }
};

}  // namespace

void attend(const Attention& a, int64_t begin, int64_t end) { attend_heads<Avx2Head>(a, begin, end); }

}  // namespace regcache
