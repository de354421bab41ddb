// Quantization and LayerNorm in AVX-512.

#include <cmath>

#include "kernels.h"
#include "vnni.h"

namespace regcache {

void quantize_values(const float* x, uint8_t* out, int64_t count, const Codes& codes) {
  const Quantizer quantizer(codes);
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 m = lanes(count - i);
    _mm_mask_storeu_epi8(out + i, m, quantizer(_mm512_maskz_loadu_ps(m, x + i)));
  }
}

void layer_norm_rows(const float* x, uint8_t* out, int64_t rows, const Norm& norm, const Codes& codes) {
  const Quantizer quantizer(codes);
  const int64_t width = norm.width;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * width;
    __m512 sum = _mm512_setzero_ps(), square = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += kLanes) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes(width - i), row + i));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / float(width));
    for (int64_t i = 0; i < width; i += kLanes) {
      const __mmask16 m = lanes(width - i);
      const __m512 d = _mm512_maskz_sub_ps(m, _mm512_maskz_loadu_ps(m, row + i), mean);
      square = _mm512_fmadd_ps(d, d, square);
    }
    const float variance = _mm512_reduce_add_ps(square) / float(width);
    const __m512 rstd = _mm512_set1_ps(1.0f / std::sqrt(variance + norm.eps));
    for (int64_t i = 0; i < width; i += kLanes) {
      const __mmask16 m = lanes(width - i);
      const __m512 d = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(m, row + i), mean), rstd);
      const __m512 y = _mm512_fmadd_ps(d, _mm512_maskz_loadu_ps(m, norm.weight + i), _mm512_maskz_loadu_ps(m, norm.bias + i));
      _mm_mask_storeu_epi8(out + r * width + i, m, quantizer(y));
    }
  }
}

}  // namespace regcache
