// The linear layer for processors with AVX2 and no VNNI. vpmaddubsw, which libraries use for u8 x s8 there, saturates in 16 bits;
// here both operands are widened to 16 bits and multiplied with vpmaddwd, whose sums of two products are 32 bits wide: exact for
// all codes.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "avx2.h"
#include "checks.h"

namespace {

using namespace regcache;

constexpr int64_t kBlockBytes = 160 * 1024;  // of widened inputs: stays in the second-level cache

inline __m256 times_sigmoid(__m256 x, __m256 y) {
  return _mm256_div_ps(x, _mm256_add_ps(all(1.0f), exp(_mm256_sub_ps(all(0.0f), y))));
}

enum class Post { kNone, kRelu, kSwish, kGelu, kTanhGelu };

// Abramowitz and Stegun 7.1.26, absolute error of erf < 1.5e-7
inline __m256 gelu(__m256 x) {
  const __m256 sign = all(-0.0f), z = _mm256_mul_ps(x, all(0.70710678f)), size = _mm256_andnot_ps(sign, z);
  const __m256 t = _mm256_div_ps(all(1.0f), _mm256_fmadd_ps(size, all(0.3275911f), all(1.0f)));
  __m256 p = all(1.061405429f);
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.0f}) p = _mm256_fmadd_ps(p, t, all(c));
  const __m256 tail = _mm256_mul_ps(p, exp(_mm256_sub_ps(all(0.0f), _mm256_mul_ps(size, size))));
  const __m256 erf = _mm256_or_ps(_mm256_sub_ps(all(1.0f), tail), _mm256_and_ps(sign, z));
  return _mm256_mul_ps(_mm256_mul_ps(x, all(0.5f)), _mm256_add_ps(all(1.0f), erf));
}

template <Post post>
inline __m256 activate(__m256 x) {
  if constexpr (post == Post::kRelu) return _mm256_max_ps(x, all(0.0f));
  if constexpr (post == Post::kSwish) return times_sigmoid(x, x);
  if constexpr (post == Post::kGelu) return gelu(x);
  if constexpr (post == Post::kTanhGelu)
    return times_sigmoid(
        x, _mm256_mul_ps(x, _mm256_fmadd_ps(_mm256_mul_ps(x, x), all(2 * 0.044715f * 0.79788456f), all(2 * 0.79788456f))));
  return x;
}

struct Target {
  float* real;
  const float* other;
  uint8_t* codes;
  Quantizer quantizer;
};

template <Post post>
void finish(const int32_t* sums, const float* scale, const float* bias, int64_t rows, int64_t columns, int64_t width,
            int64_t place, const Target& out) {
  alignas(32) float y[kColumns];
  alignas(16) uint8_t codes[kColumns];
  for (int64_t r = 0; r < rows; ++r, place += width) {
    __m256 values[2];
  UNROLL for (int c = 0; c < 2; ++c) {
      const __m256 sum = _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)(sums + r * kColumns + 8 * c)));
      values[c] = activate<post>(_mm256_fmadd_ps(sum, _mm256_loadu_ps(scale + 8 * c), _mm256_loadu_ps(bias + 8 * c)));
    }
    if (out.codes != nullptr) {
      const __m128i bytes = out.quantizer(values[0], values[1]);
      if (columns == kColumns) {
        _mm_storeu_si128((__m128i*)(out.codes + place), bytes);
      } else {
        _mm_store_si128((__m128i*)codes, bytes);
        std::memcpy(out.codes + place, codes, columns);
      }
      continue;
    }
    if (columns == kColumns) {
      UNROLL for (int c = 0; c < 2; ++c) {
        if (out.other != nullptr) values[c] = _mm256_add_ps(values[c], _mm256_loadu_ps(out.other + place + 8 * c));
        _mm256_storeu_ps(out.real + place + 8 * c, values[c]);
      }
      continue;
    }
    UNROLL for (int c = 0; c < 2; ++c) _mm256_store_ps(y + 8 * c, values[c]);
    for (int64_t c = 0; c < columns; ++c) out.real[place + c] = out.other != nullptr ? y[c] + out.other[place + c] : y[c];
  }
}

using Finish = void (*)(const int32_t*, const float*, const float*, int64_t, int64_t, int64_t, int64_t, const Target&);

Finish finisher(c10::string_view post, c10::string_view algorithm) {
  if (post == "none") return finish<Post::kNone>;
  if (post == "relu") return finish<Post::kRelu>;
  if (post == "swish") return finish<Post::kSwish>;
  return algorithm == "tanh" ? finish<Post::kTanhGelu> : finish<Post::kGelu>;
}

}  // namespace

// post(scale weight_scale (codes - zero_point) w + bias) (+ other), float32 or u8. codes: u8 [..., in]; packed: s8
// [ceil(out / 16) * ceil(in / 2) * 16 * 2], zeros beyond the edges; weight_scale, bias: float32 [out]
static at::Tensor linear(const at::Tensor& input, double scale, int64_t zero_point, const at::Tensor& packed,
                         const at::Tensor& weight_scale, const Maybe& bias,
                         const Maybe& other, double out_scale, int64_t out_zero, bool as_codes,
                         c10::string_view post, c10::string_view algorithm) {
  const Check check("linear");
  check.tensor("codes", input, at::kByte, -1);
  const int64_t width = input.dim() ? input.size(-1) : 0;
  TORCH_CHECK(0 < width && width <= kLongestSum, "regcache::linear: `codes` must have 1 to ", kLongestSum,
              " values in the last axis, got shape ", input.sizes());
  check.positive("scale", scale);
  check.between("zero_point", zero_point, 0, 255);
  check.tensor("weight_scale", weight_scale, at::kFloat, 1);
  const int64_t rows = input.numel() / width, columns = weight_scale.size(0);
  const int64_t panels = (columns + kColumns - 1) / kColumns, pairs = (width + 1) / 2, stride = 2 * pairs;
  check.tensor("packed", packed, at::kChar, 1);
  check.contiguous("packed", packed);
  TORCH_CHECK(packed.numel() == panels * kColumns * stride, "regcache::linear: `packed` must have ", panels * kColumns * stride,
              " bytes for ", width, " inputs and ", columns, " outputs, got ", packed.numel());
  if (bias.has_value()) check.shape("bias", *bias, at::kFloat, {columns});
  check.positive("out_scale", out_scale);
  check.between("out_zero", out_zero, 0, 255);
  check.activation(post, algorithm);
  const at::Tensor in = input.contiguous(), step = weight_scale.contiguous();
  std::vector<int64_t> sizes(in.sizes().begin(), in.sizes().end());
  sizes.back() = columns;
  at::Tensor out = at::empty(sizes, in.options().dtype(as_codes ? at::kByte : at::kFloat));
  TORCH_CHECK(!other.has_value() || !as_codes, "regcache::linear: `other` is added to real numbers, got as_codes=True");
  if (other.has_value()) check.shape("other", *other, at::kFloat, sizes);
  const at::Tensor added = other.has_value() ? other->contiguous() : at::Tensor();

  std::vector<float> scales(panels * kColumns), biases(panels * kColumns);
  for (int64_t c = 0; c < columns; ++c) scales[c] = float(scale) * step.const_data_ptr<float>()[c];
  if (bias.has_value()) std::copy_n(bias->contiguous().const_data_ptr<float>(), columns, biases.begin());
  const Target target{as_codes ? nullptr : out.data_ptr<float>(), added.defined() ? added.const_data_ptr<float>() : nullptr,
                      as_codes ? out.data_ptr<uint8_t>() : nullptr, Quantizer({float(1.0 / out_scale), int32_t(out_zero), 255})};
  const Finish done = finisher(post, algorithm);
  const uint8_t* source = in.const_data_ptr<uint8_t>();
  const int8_t* weights = packed.const_data_ptr<int8_t>();

  // blocks of rows, as many as divide well among the threads; few rows are divided by columns instead
  const int64_t threads = at::get_num_threads(), most = std::max(kRows, kBlockBytes / (2 * std::max<int64_t>(stride, 1)) / kRows * kRows);
  int64_t blocks = (rows + most - 1) / most, parts = 1;
  if (rows > 2 * kRows * threads) blocks = round_up(blocks, threads);
  else parts = std::min(threads, panels);
  const int64_t block = round_up((rows + std::max<int64_t>(blocks, 1) - 1) / std::max<int64_t>(blocks, 1), kRows);
  at::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<int16_t> wide(std::min(block, round_up(rows, kRows)) * stride);
    alignas(32) int32_t sums[kRows * kColumns];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / parts * block, count = std::min(block, rows - first);
      if (count <= 0) continue;
      for (int64_t r = 0; r < count; ++r) {
        int16_t* row = wide.data() + r * stride;
        for (int64_t i = 0; i < width; ++i) row[i] = int16_t(source[(first + r) * width + i] - int16_t(zero_point));
        if (width % 2) row[width] = 0;
      }
      const int64_t from = panels * (task % parts) / parts, to = panels * (task % parts + 1) / parts;
      for (int64_t p = from; p < to; ++p)
        for (int64_t r = 0; r < count; r += kRows) {
          tile(wide.data() + r * stride, stride, weights + p * pairs * 2 * kColumns, pairs, sums);
          done(sums, scales.data() + p * kColumns, biases.data() + p * kColumns, std::min(kRows, count - r),
               std::min(kColumns, columns - p * kColumns), columns, (first + r) * columns + p * kColumns, target);
        }
    }
  });
  return out;
}

TORCH_LIBRARY_FRAGMENT(regcache, m) {
  m.def(
      "linear(Tensor codes, float scale, int zero_point, Tensor packed, Tensor weight_scale, Tensor? bias, Tensor? other, "
      "float out_scale, int out_zero, bool as_codes, str post, str algorithm) -> Tensor");
}

TORCH_LIBRARY_IMPL(regcache, CPU, m) {
  m.impl("linear", &linear);
}
