// What the AVX2 operators share: quantizer, exp, and the tile of an exact product of 16-bit inputs and s8 weights.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

// keeps the accumulators of a tile in registers
#define UNROLL _Pragma("GCC unroll 8")

namespace regcache {

constexpr int64_t kRows = 6, kColumns = 16;  // register tile: 6 x 2 accumulators of 8 sums

inline __m256 all(float x) { return _mm256_set1_ps(x); }

struct Quantizer : Codes {
  explicit Quantizer(const Codes& codes) : Codes(codes) {}

  __m256i code(__m256 x) const {  // beyond the int32 range the conversion gives INT_MIN, also for large positive values
    x = _mm256_min_ps(_mm256_mul_ps(x, all(inverse)), all(1e6f));
    return _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(zero_point));
  }
  // 16 codes: the saturation of both packing instructions is the clamp to 0 and 255
  __m128i operator()(__m256 low, __m256 high) const {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(code(low), code(high)), 0xD8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    return _mm_min_epu8(bytes, _mm_set1_epi8(char(highest)));
  }
};

// relative error < 2e-7 on the range of float32; Cody and Waite's reduction, polynomial of degree 6
inline __m256 exp(__m256 x) {
  x = _mm256_min_ps(_mm256_max_ps(x, all(-87.0f)), all(88.0f));
  const __m256 whole = _mm256_round_ps(_mm256_mul_ps(x, all(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_fnmadd_ps(whole, all(-2.12194440e-4f), _mm256_fnmadd_ps(whole, all(0.693359375f), x));
  __m256 p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f})
    p = _mm256_fmadd_ps(p, f, all(c));
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));
}

// sums[r][c] = sum_i x[r][i] w[i][c]; x: int16 rows, `stride` apart; w: s8 [pairs][16][2]
__attribute__((noinline)) inline void tile(const int16_t* x, int64_t stride, const int8_t* w, int64_t pairs, int32_t* sums) {
  __m256i total[kRows][2];
  UNROLL for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = _mm256_setzero_si256();
  for (int64_t i = 0; i < pairs; ++i) {
    const __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + 32 * i)));
    const __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + 32 * i + 16)));
    UNROLL for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * stride + 2 * i, 4);
      const __m256i value = _mm256_set1_epi32(pair);
      total[r][0] = _mm256_add_epi32(total[r][0], _mm256_madd_epi16(value, low));
      total[r][1] = _mm256_add_epi32(total[r][1], _mm256_madd_epi16(value, high));
    }
  }
  UNROLL for (int r = 0; r < kRows; ++r)
    UNROLL for (int c = 0; c < 2; ++c) _mm256_storeu_si256((__m256i*)(sums + r * kColumns + 8 * c), total[r][c]);
}

inline int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

}  // namespace regcache
