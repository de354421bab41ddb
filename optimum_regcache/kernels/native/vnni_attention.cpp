// int8 attention with register rows in AVX-512 with VNNI. What surrounds the products is attention_loop.h.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention_loop.h"
#include "vnni.h"

namespace regcache {
namespace {

constexpr int64_t kTileRows = 6;  // query rows of a register tile: kTileRows x 4 accumulators

// four bytes of other arrays
typedef int32_t __attribute__((may_alias)) Word;

// 2^x for x <= 127, relative error < 5e-5; almost 0 below -126
inline __m512 exp2(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(9.6181291e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// sums += four products of u8 and s8 bytes per lane; the intrinsic makes GCC copy the accumulators around
inline void dot(__m512i& sums, __m512i u8, __m512i s8) { asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(u8), "v"(s8)); }

// What one head needs, for one thread.
struct VnniHead {
  static constexpr int64_t kRows = kTileRows;
  static constexpr double kPerNat = 1.4426950408889634;  // logits are logarithms to the base 2
  static constexpr float kMost = 100.0f;

  const int64_t tokens, width, padded, channels;  // both up to a multiple of kLanes
  Lines<uint8_t> key_rows, key_packed, probabilities;
  Lines<int8_t> value_packed, query;
  Lines<float> key_scale, value_scale, logits, result;
  int32_t row_start[kRows] = {};

  VnniHead(int64_t tokens, int64_t width)
      : tokens(tokens), width(width), padded((tokens + kLanes - 1) / kLanes * kLanes),
        channels((width + kLanes - 1) / kLanes * kLanes), key_rows(padded * channels), key_packed(padded * channels),
        probabilities(kRows * padded), value_packed(padded * channels), query(kRows * channels), key_scale(padded),
        value_scale(channels), logits(kRows * padded), result(kRows * channels) {}

  void pack_keys(const float* key, int64_t stride);
  void pack_values(const float* value, int64_t stride);
  float round_query(const float* q, int64_t r);
  void multiply_keys(int64_t rows, const float* row_scale);
  float softmax(int64_t r, float& top);
  void multiply_values(int64_t rows);
  void write(const Attention& a, int64_t r, const float* mass, const float* registers, float factor, int64_t place) const;
  float dot(const float* x, const float* y) const;
  static float exp(float x) { return _mm512_cvtss_f32(exp2(_mm512_set1_ps(x))); }
};

// Keys: one scale per token, u8 codes (zero point 128), laid out [width / 4][tokens][4] for the dot product instruction.
void VnniHead::pack_keys(const float* key, int64_t stride) {
  for (int64_t j = 0; j < padded; ++j) {
    uint8_t* row = key_rows.data() + j * channels;
    if (j >= tokens) {
      std::memset(row, 128, channels);
      key_scale[j] = 0.0f;
      continue;
    }
    __m512 best = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += kLanes)
      best = abs_max(best, _mm512_maskz_loadu_ps(lanes(width - i), key + j * stride + i));
    const float top = std::max(_mm512_reduce_max_ps(best), 1e-30f);
    key_scale[j] = top / 127.0f;
    const __m512 inverse = _mm512_set1_ps(127.0f / top);
    for (int64_t i = 0; i < width; i += kLanes) {
      const __m512 v = _mm512_maskz_loadu_ps(lanes(width - i), key + j * stride + i);
      _mm_storeu_si128((__m128i*)(row + i), to_u8(v, inverse, _mm512_set1_epi32(128), _mm512_set1_epi32(255)));
    }
  }
  const Word* from = (const Word*)key_rows.data();
  Word* to = (Word*)key_packed.data();
  const __m512i index = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                           _mm512_set1_epi32(int(channels / 4)));
  for (int64_t j = 0; j < padded; j += kLanes)
    for (int64_t i = 0; i < channels / 4; ++i)
      _mm512_storeu_si512(to + i * padded + j, _mm512_i32gather_epi32(index, from + j * (channels / 4) + i, 4));
}

// Values: one scale per channel, s8 codes, laid out [tokens / 4][width][4].
void VnniHead::pack_values(const float* value, int64_t stride) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const __mmask16 m = lanes(width - i);
    __m512 best = _mm512_set1_ps(1e-30f);
    for (int64_t j = 0; j < tokens; ++j) best = abs_max(best, _mm512_maskz_loadu_ps(m, value + j * stride + i));
    _mm512_storeu_ps(value_scale.data() + i, _mm512_mul_ps(best, _mm512_set1_ps(1.0f / 127.0f)));
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(127.0f), best);
    const __m512i byte = _mm512_set1_epi32(255);
    for (int64_t j = 0; j < padded; j += 4) {
      __m512i word = _mm512_setzero_si512();
      for (int64_t k = 0; k < 4 && j + k < tokens; ++k) {
        const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, value + (j + k) * stride + i), inverse);
        const __m512i code = _mm512_and_si512(_mm512_cvtps_epi32(v), byte);
        word = _mm512_or_si512(word, _mm512_sllv_epi32(code, _mm512_set1_epi32(int(8 * k))));
      }
      _mm512_storeu_si512((Word*)value_packed.data() + (j / 4) * channels + i, word);
    }
  }
}

// logits[r][j] = scale_q[r] scale_k[j] sum_i q[r][i] k[j][i] for `kCount` registers of keys from token j on
template <int kCount>
__attribute__((noinline)) void key_tile(VnniHead& t, int64_t j, const float* row_scale) {
  const int64_t padded = t.padded, words = t.channels / 4;
  const Word *keys = (const Word*)t.key_packed.data() + j, *query = (const Word*)t.query.data();
  const float* key_scale = t.key_scale.data();
  float* logits = t.logits.data();
  __m512i sums[kTileRows][kCount];
  UNROLL for (int r = 0; r < kTileRows; ++r)
    UNROLL for (int c = 0; c < kCount; ++c) sums[r][c] = _mm512_set1_epi32(t.row_start[r]);
  for (int64_t i = 0; i < words; ++i) {
    __m512i k[kCount];
    UNROLL for (int c = 0; c < kCount; ++c) k[c] = _mm512_loadu_si512(keys + i * padded + c * kLanes);
    UNROLL for (int r = 0; r < kTileRows; ++r) {
      const __m512i q = _mm512_set1_epi32(query[r * words + i]);
      UNROLL for (int c = 0; c < kCount; ++c) dot(sums[r][c], k[c], q);
    }
  }
  UNROLL for (int c = 0; c < kCount; ++c) {
    const __m512 scale = _mm512_loadu_ps(key_scale + j + c * kLanes);
    UNROLL for (int r = 0; r < kTileRows; ++r)
      _mm512_storeu_ps(logits + r * padded + j + c * kLanes,
                       _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][c]), scale), _mm512_set1_ps(row_scale[r])));
  }
}

// sums[r][channel] = sum_j p[r][j] v[j][channel]
template <int kCount>
__attribute__((noinline)) void value_tile(VnniHead& t, int64_t channel) {
  const int64_t padded = t.padded, channels = t.channels;
  const Word *values = (const Word*)t.value_packed.data() + channel, *p = (const Word*)t.probabilities.data();
  const float* value_scale = t.value_scale.data();
  float* result = t.result.data();
  __m512i sums[kTileRows][kCount];
  UNROLL for (int r = 0; r < kTileRows; ++r)
    UNROLL for (int c = 0; c < kCount; ++c) sums[r][c] = _mm512_setzero_si512();
  for (int64_t j = 0; j < (t.tokens + 3) / 4; ++j) {
    __m512i v[kCount];
    UNROLL for (int c = 0; c < kCount; ++c) v[c] = _mm512_loadu_si512(values + j * channels + c * kLanes);
    UNROLL for (int r = 0; r < kTileRows; ++r) {
      const __m512i weight = _mm512_set1_epi32(p[r * (padded / 4) + j]);
      UNROLL for (int c = 0; c < kCount; ++c) dot(sums[r][c], weight, v[c]);
    }
  }
  UNROLL for (int r = 0; r < kTileRows; ++r)
    UNROLL for (int c = 0; c < kCount; ++c)
      _mm512_storeu_ps(result + r * channels + channel + c * kLanes,
                       _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][c]), _mm512_loadu_ps(value_scale + channel + c * kLanes)));
}

void VnniHead::multiply_keys(int64_t /* rows: those beyond hold old codes, nobody reads what becomes of them */, const float* row_scale) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= padded; j += 4 * kLanes) key_tile<4>(*this, j, row_scale);
  const int64_t rest = (padded - j) / kLanes;
  if (rest == 3) key_tile<3>(*this, j, row_scale);
  if (rest == 2) key_tile<2>(*this, j, row_scale);
  if (rest == 1) key_tile<1>(*this, j, row_scale);
}

void VnniHead::multiply_values(int64_t /* rows */) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) value_tile<4>(*this, c);
  const int64_t rest = (channels - c) / kLanes;
  if (rest == 3) value_tile<3>(*this, c);
  if (rest == 2) value_tile<2>(*this, c);
  if (rest == 1) value_tile<1>(*this, c);
}

float VnniHead::round_query(const float* q, int64_t r) {
  const int64_t width = this->width;
  int8_t* codes = query.data() + r * channels;
  __m512 best = _mm512_set1_ps(1e-30f);
  for (int64_t i = 0; i < width; i += kLanes) best = abs_max(best, _mm512_maskz_loadu_ps(lanes(width - i), q + i));
  const float top = _mm512_reduce_max_ps(best);
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < width; i += kLanes) {
    const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(width - i), q + i), _mm512_set1_ps(127.0f / top));
    const __m512i code = _mm512_cvtps_epi32(v);
    total = _mm512_add_epi32(total, code);
    _mm_storeu_si128((__m128i*)(codes + i), _mm512_cvtepi32_epi8(code));
  }
  row_start[r] = -128 * _mm512_reduce_add_epi32(total);  // zero point of the keys
  return top / 127.0f;
}

float VnniHead::softmax(int64_t r, float& top) {
  const int64_t tokens = this->tokens, padded = this->padded;  // a store into bytes might change the members
  const float* row = logits.data() + r * padded;
  uint8_t* codes = probabilities.data() + r * padded;
  __m512 best = _mm512_set1_ps(-INFINITY);
  for (int64_t i = 0; i < tokens; i += kLanes) best = _mm512_mask_max_ps(best, lanes(tokens - i), best, _mm512_loadu_ps(row + i));
  top = _mm512_reduce_max_ps(best);
  const __m512 shift = _mm512_set1_ps(top);
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < padded; i += kLanes) {
    const __m512 p = exp2(_mm512_sub_ps(_mm512_loadu_ps(row + i), shift));
    const __m512i code = _mm512_maskz_cvtps_epi32(lanes(tokens - i), _mm512_mul_ps(p, _mm512_set1_ps(255.0f)));
    total = _mm512_add_epi32(total, code);
    _mm_storeu_si128((__m128i*)(codes + i), _mm512_cvtepi32_epi8(code));
  }
  return float(_mm512_reduce_add_epi32(total));
}

void VnniHead::write(const Attention& a, int64_t r, const float* mass, const float* registers, float factor, int64_t place) const {
  const Quantizer quantizer(a.codes);
  const int64_t width = this->width, count = a.registers;
  const float* row = result.data() + r * channels;
  float* real = a.real == nullptr ? nullptr : a.real + place;
  uint8_t* codes = a.out == nullptr ? nullptr : a.out + place;
  for (int64_t i = 0; i < width; i += kLanes) {
    const __mmask16 m = lanes(width - i);
    __m512 o = _mm512_loadu_ps(row + i);
    for (int64_t n = 0; n < count; ++n)
      o = _mm512_fmadd_ps(_mm512_set1_ps(mass[n]), _mm512_maskz_loadu_ps(m, registers + n * width + i), o);
    o = _mm512_mul_ps(o, _mm512_set1_ps(factor));
    if (real != nullptr) {
      _mm512_mask_storeu_ps(real + i, m, o);
    } else {
      _mm_mask_storeu_epi8(codes + i, m, quantizer(o));
    }
  }
}

float VnniHead::dot(const float* x, const float* y) const {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += kLanes) {
    const __mmask16 m = lanes(width - i);
    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(m, x + i), _mm512_maskz_loadu_ps(m, y + i), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

}  // namespace

void attend(const Attention& a, int64_t begin, int64_t end) { attend_heads<VnniHead>(a, begin, end); }

}  // namespace regcache
