// Quantization and LayerNorm in AVX2.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "avx2.h"
#include "kernels.h"

namespace regcache {

void quantize_values(const float* x, uint8_t* out, int64_t count, const Codes& settings) {
  const Quantizer quantizer(settings);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    _mm_storeu_si128((__m128i*)(out + i), quantizer(_mm256_loadu_ps(x + i), _mm256_loadu_ps(x + i + 8)));
  if (i == count) return;
  alignas(32) float rest[16] = {};
  alignas(16) uint8_t codes[16];
  std::copy_n(x + i, count - i, rest);
  _mm_store_si128((__m128i*)codes, quantizer(_mm256_load_ps(rest), _mm256_load_ps(rest + 8)));
  std::memcpy(out + i, codes, count - i);
}

void layer_norm_rows(const float* x, uint8_t* out, int64_t rows, const Norm& norm, const Codes& codes) {
  const int64_t width = norm.width;
  const float *w = norm.weight, *b = norm.bias;
  std::vector<float> normed(width);
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * width;
    float sum = 0.0f, square = 0.0f;
    for (int64_t i = 0; i < width; ++i) sum += row[i];
    const float mean = sum / float(width);
    for (int64_t i = 0; i < width; ++i) square += (row[i] - mean) * (row[i] - mean);
    const float rstd = 1.0f / std::sqrt(square / float(width) + norm.eps);
    for (int64_t i = 0; i < width; ++i) normed[i] = (row[i] - mean) * rstd * w[i] + b[i];
    quantize_values(normed.data(), out + r * width, width, codes);
  }
}

}  // namespace regcache
