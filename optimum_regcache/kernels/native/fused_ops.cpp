// Fused CPU operators of the int8 runtime: quantize, LayerNorm + quantize, int8 attention with register rows.
// Built by native/__init__.py for the machine it runs on; needs AVX-512 with VNNI. Matrix products of linear layers stay
// with oneDNN. Every operator has a plain PyTorch twin in kernels/fused_ops.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "attention.h"
#include "fused_ops.h"

// keeps the accumulators of a tile in registers
#define UNROLL _Pragma("GCC unroll 8")

namespace {

using regcache::kMaxRegisters;
using regcache::Registers;

constexpr int64_t kLanes = 16;   // float32 lanes of a register
constexpr int64_t kRows = 6;     // query rows of a register tile: kRows x 4 accumulators

inline __mmask16 lanes(int64_t count) {
  return count >= kLanes ? __mmask16(0xFFFF) : __mmask16((1u << count) - 1);
}

inline __m512 abs_max(__m512 best, __m512 x) { return _mm512_max_ps(best, _mm512_abs_ps(x)); }

// u8 codes: round half to even, then shift, then clamp
inline __m128i to_u8(__m512 x, __m512 inverse, __m512i zero_point, __m512i highest) {
  // far outside the int32 range the conversion gives INT_MIN, also for large positive values: clamp before
  x = _mm512_max_ps(_mm512_min_ps(_mm512_mul_ps(x, inverse), _mm512_set1_ps(1e6f)), _mm512_set1_ps(-1e6f));
  __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(x), zero_point);
  return _mm512_cvtepi32_epi8(_mm512_min_epi32(_mm512_max_epi32(code, _mm512_setzero_si512()), highest));
}

// u8 code = clamp(round(x * inverse) + zero_point, 0, highest)
struct Quantizer {
  float inverse;
  int32_t zero_point, highest;
  Quantizer(double inverse, int64_t zero_point, int64_t highest)
      : inverse(float(inverse)), zero_point(int32_t(zero_point)), highest(int32_t(highest)) {}
  __m128i operator()(__m512 x) const {
    return to_u8(x, _mm512_set1_ps(inverse), _mm512_set1_epi32(zero_point), _mm512_set1_epi32(highest));
  }
};

void quantize_row(const float* x, uint8_t* out, int64_t width, const Quantizer& codes) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const __mmask16 m = lanes(width - i);
    _mm_mask_storeu_epi8(out + i, m, codes(_mm512_maskz_loadu_ps(m, x + i)));
  }
}

at::Tensor quantize(const at::Tensor& x, double inverse, int64_t zero_point, int64_t highest) {
  const at::Tensor in = x.contiguous();
  at::Tensor out = at::empty(in.sizes(), in.options().dtype(at::kByte));
  const int64_t width = in.dim() ? in.size(-1) : 1, rows = width ? in.numel() / width : 0;
  const float* source = in.const_data_ptr<float>();
  uint8_t* target = out.data_ptr<uint8_t>();
  const Quantizer codes(inverse, zero_point, highest);
  at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) quantize_row(source + r * width, target + r * width, width, codes);
  });
  return out;
}

}  // namespace

at::Tensor regcache::layer_norm_quantize(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps,
                               double inverse, int64_t zero_point, int64_t highest) {
  const at::Tensor in = x.contiguous();
  at::Tensor out = at::empty(in.sizes(), in.options().dtype(at::kByte));
  const int64_t width = in.size(-1), rows = width ? in.numel() / width : 0;
  const float *source = in.const_data_ptr<float>(), *w = weight.const_data_ptr<float>(), *b = bias.const_data_ptr<float>();
  uint8_t* target = out.data_ptr<uint8_t>();
  const Quantizer codes(inverse, zero_point, highest);
  at::parallel_for(0, rows, std::max<int64_t>(1, 8192 / std::max<int64_t>(width, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = source + r * width;
      __m512 sum = _mm512_setzero_ps(), square = _mm512_setzero_ps();
      for (int64_t i = 0; i < width; i += kLanes) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes(width - i), row + i));
      const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / float(width));
      for (int64_t i = 0; i < width; i += kLanes) {
        const __mmask16 m = lanes(width - i);
        const __m512 d = _mm512_maskz_sub_ps(m, _mm512_maskz_loadu_ps(m, row + i), mean);
        square = _mm512_fmadd_ps(d, d, square);
      }
      const float variance = _mm512_reduce_add_ps(square) / float(width);
      const __m512 rstd = _mm512_set1_ps(1.0f / std::sqrt(variance + float(eps)));
      for (int64_t i = 0; i < width; i += kLanes) {
        const __mmask16 m = lanes(width - i);
        const __m512 d = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(m, row + i), mean), rstd);
        const __m512 y = _mm512_fmadd_ps(d, _mm512_maskz_loadu_ps(m, w + i), _mm512_maskz_loadu_ps(m, b + i));
        _mm_mask_storeu_epi8(target + r * width + i, m, codes(y));
      }
    }
  });
  return out;
}

namespace {

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
inline void dot(__m512i& sums, __m512i u8, __m512i s8) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(u8), "v"(s8));
}

struct Shape {
  int64_t batch, tokens, heads, width;  // width = head_dim
  int64_t vectors() const { return (width + kLanes - 1) / kLanes; }
  int64_t padded() const { return (tokens + kLanes - 1) / kLanes * kLanes; }
};

// What one head needs, for one thread.
struct Scratch {
  std::vector<uint8_t> key_rows, key_packed, probabilities;
  std::vector<int8_t> value_packed, query;
  std::vector<float> key_scale, value_scale, logits, query_float;
  explicit Scratch(const Shape& s)
      : key_rows(s.padded() * s.vectors() * kLanes), key_packed(s.padded() * s.vectors() * kLanes),
        probabilities(kRows * s.padded()), value_packed(s.padded() * s.vectors() * kLanes),
        query(kRows * s.vectors() * kLanes), key_scale(s.padded()), value_scale(s.vectors() * kLanes),
        logits(kRows * s.padded()), query_float(kRows * s.vectors() * kLanes) {}
};

// Keys: one scale per token, u8 codes (zero point 128), laid out [width / 4][tokens][4] for the dot product instruction.
void pack_keys(const float* key, int64_t stride, const Shape& s, Scratch& t) {
  const int64_t bytes = s.vectors() * kLanes, padded = s.padded();
  for (int64_t j = 0; j < padded; ++j) {
    uint8_t* row = t.key_rows.data() + j * bytes;
    if (j >= s.tokens) {
      std::memset(row, 128, bytes);
      t.key_scale[j] = 0.0f;
      continue;
    }
    __m512 best = _mm512_setzero_ps();
    for (int64_t i = 0; i < s.width; i += kLanes) best = abs_max(best, _mm512_maskz_loadu_ps(lanes(s.width - i), key + j * stride + i));
    const float top = std::max(_mm512_reduce_max_ps(best), 1e-30f);
    t.key_scale[j] = top / 127.0f;
    const __m512 inverse = _mm512_set1_ps(127.0f / top);
    for (int64_t i = 0; i < s.width; i += kLanes) {
      const __m512 v = _mm512_maskz_loadu_ps(lanes(s.width - i), key + j * stride + i);
      _mm_storeu_si128((__m128i*)(row + i), to_u8(v, inverse, _mm512_set1_epi32(128), _mm512_set1_epi32(255)));
    }
  }
  const int32_t* from = (const int32_t*)t.key_rows.data();
  int32_t* to = (int32_t*)t.key_packed.data();
  const __m512i index = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                           _mm512_set1_epi32(int(bytes / 4)));
  for (int64_t j = 0; j < padded; j += kLanes)
    for (int64_t i = 0; i < bytes / 4; ++i)
      _mm512_storeu_si512(to + i * padded + j, _mm512_i32gather_epi32(index, from + j * (bytes / 4) + i, 4));
}

// Values: one scale per channel, s8 codes, laid out [tokens / 4][width][4].
void pack_values(const float* value, int64_t stride, const Shape& s, Scratch& t) {
  const int64_t channels = s.vectors() * kLanes;
  for (int64_t i = 0; i < s.width; i += kLanes) {
    const __mmask16 m = lanes(s.width - i);
    __m512 best = _mm512_set1_ps(1e-30f);
    for (int64_t j = 0; j < s.tokens; ++j) best = abs_max(best, _mm512_maskz_loadu_ps(m, value + j * stride + i));
    _mm512_storeu_ps(t.value_scale.data() + i, _mm512_mul_ps(best, _mm512_set1_ps(1.0f / 127.0f)));
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(127.0f), best);
    const __m512i byte = _mm512_set1_epi32(255);
    for (int64_t j = 0; j < s.padded(); j += 4) {
      __m512i word = _mm512_setzero_si512();
      for (int64_t k = 0; k < 4 && j + k < s.tokens; ++k) {
        const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, value + (j + k) * stride + i), inverse);
        const __m512i code = _mm512_and_si512(_mm512_cvtps_epi32(v), byte);
        word = _mm512_or_si512(word, _mm512_sllv_epi32(code, _mm512_set1_epi32(int(8 * k))));
      }
      _mm512_storeu_si512((int32_t*)t.value_packed.data() + (j / 4) * channels + i, word);
    }
  }
}

// logits[r][j] = scale_q[r] scale_k[j] sum_i q[r][i] k[j][i] for `kCount` registers of keys from token j on
template <int kCount>
__attribute__((noinline)) void key_tile(const Scratch& t, const Shape& s, int64_t j, const float* row_scale, const int32_t* row_start, float* logits) {
  const int64_t padded = s.padded(), words = s.vectors() * kLanes / 4;
  const int32_t *keys = (const int32_t*)t.key_packed.data() + j, *query = (const int32_t*)t.query.data();
  __m512i sums[kRows][kCount];
  UNROLL for (int r = 0; r < kRows; ++r)
    UNROLL for (int c = 0; c < kCount; ++c) sums[r][c] = _mm512_set1_epi32(row_start[r]);
  for (int64_t i = 0; i < words; ++i) {
    __m512i k[kCount];
    UNROLL for (int c = 0; c < kCount; ++c) k[c] = _mm512_loadu_si512(keys + i * padded + c * kLanes);
    UNROLL for (int r = 0; r < kRows; ++r) {
      const __m512i q = _mm512_set1_epi32(query[r * words + i]);
      UNROLL for (int c = 0; c < kCount; ++c) dot(sums[r][c], k[c], q);
    }
  }
  UNROLL for (int c = 0; c < kCount; ++c) {
    const __m512 scale = _mm512_loadu_ps(t.key_scale.data() + j + c * kLanes);
    UNROLL for (int r = 0; r < kRows; ++r)
      _mm512_storeu_ps(logits + r * padded + j + c * kLanes,
                       _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][c]), scale), _mm512_set1_ps(row_scale[r])));
  }
}

// sums[r][channel] = sum_j p[r][j] v[j][channel]
template <int kCount>
__attribute__((noinline)) void value_tile(const Scratch& t, const Shape& s, int64_t channel, float* out /* [kRows][channels] */) {
  const int64_t padded = s.padded(), channels = s.vectors() * kLanes;
  const int32_t *values = (const int32_t*)t.value_packed.data() + channel, *p = (const int32_t*)t.probabilities.data();
  __m512i sums[kRows][kCount];
  UNROLL for (int r = 0; r < kRows; ++r)
    UNROLL for (int c = 0; c < kCount; ++c) sums[r][c] = _mm512_setzero_si512();
  for (int64_t j = 0; j < (s.tokens + 3) / 4; ++j) {
    __m512i v[kCount];
    UNROLL for (int c = 0; c < kCount; ++c) v[c] = _mm512_loadu_si512(values + j * channels + c * kLanes);
    UNROLL for (int r = 0; r < kRows; ++r) {
      const __m512i weight = _mm512_set1_epi32(p[r * (padded / 4) + j]);
      UNROLL for (int c = 0; c < kCount; ++c) dot(sums[r][c], weight, v[c]);
    }
  }
  UNROLL for (int r = 0; r < kRows; ++r)
    UNROLL for (int c = 0; c < kCount; ++c)
      _mm512_storeu_ps(out + r * channels + channel + c * kLanes,
                       _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][c]), _mm512_loadu_ps(t.value_scale.data() + channel + c * kLanes)));
}

struct Output {
  float* real = nullptr;
  uint8_t* codes = nullptr;
  Quantizer quantizer{0.0, 0, 0};
};

void attend(const float* query, const float* key, const float* value, int64_t stride, int64_t head, float scaling,
            const Shape& s, const Registers& g, const Output& out, int64_t out_offset, Scratch& t) {
  const int64_t padded = s.padded(), channels = s.vectors() * kLanes, out_stride = s.heads * s.width;
  pack_keys(key, stride, s, t);
  pack_values(value, stride, s, t);
  const float log2e = 1.44269504f;
  float row_scale[kRows], mass[kRows][kMaxRegisters];
  int32_t row_start[kRows];
  for (int64_t first = 0; first < s.tokens; first += kRows) {
    const int64_t rows = std::min(kRows, s.tokens - first);
    std::memset(t.query.data(), 0, t.query.size());
    for (int64_t r = 0; r < rows; ++r) {  // one scale per query; it only scales the row's logits
      const float* q = query + (first + r) * stride;
      __m512 best = _mm512_set1_ps(1e-30f);
      for (int64_t i = 0; i < s.width; i += kLanes) best = abs_max(best, _mm512_maskz_loadu_ps(lanes(s.width - i), q + i));
      const float top = _mm512_reduce_max_ps(best);
      __m512i total = _mm512_setzero_si512();
      for (int64_t i = 0; i < s.width; i += kLanes) {
        const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(s.width - i), q + i), _mm512_set1_ps(127.0f / top));
        const __m512i code = _mm512_cvtps_epi32(v);
        total = _mm512_add_epi32(total, code);
        _mm_storeu_si128((__m128i*)(t.query.data() + r * channels + i), _mm512_cvtepi32_epi8(code));
      }
      row_scale[r] = top / 127.0f * scaling * log2e;
      row_start[r] = -128 * _mm512_reduce_add_epi32(total);  // zero point of the keys
    }
    for (int64_t r = rows; r < kRows; ++r) row_scale[r] = 0.0f, row_start[r] = 0;
    float* logits = t.logits.data();
    int64_t j = 0;
    for (; j + 4 * kLanes <= padded; j += 4 * kLanes) key_tile<4>(t, s, j, row_scale, row_start, logits);
    const int64_t rest = (padded - j) / kLanes;
    if (rest == 3) key_tile<3>(t, s, j, row_scale, row_start, logits);
    if (rest == 2) key_tile<2>(t, s, j, row_scale, row_start, logits);
    if (rest == 1) key_tile<1>(t, s, j, row_scale, row_start, logits);

    // probabilities relative to the largest logit of an image token, as u8; registers stay outside their range
    float inverse_total[kRows];
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = logits + r * padded;
      __m512 top = _mm512_set1_ps(-INFINITY);
      for (int64_t i = 0; i < s.tokens; i += kLanes)
        top = _mm512_mask_max_ps(top, lanes(s.tokens - i), top, _mm512_loadu_ps(row + i));
      const float highest = _mm512_reduce_max_ps(top);
      const __m512 shift = _mm512_set1_ps(highest);
      __m512i total = _mm512_setzero_si512();
      for (int64_t i = 0; i < padded; i += kLanes) {
        const __m512 p = exp2(_mm512_sub_ps(_mm512_loadu_ps(row + i), shift));
        const __m512i code = _mm512_maskz_cvtps_epi32(s.tokens > i ? lanes(s.tokens - i) : __mmask16(0), _mm512_mul_ps(p, _mm512_set1_ps(255.0f)));
        total = _mm512_add_epi32(total, code);
        _mm_storeu_si128((__m128i*)(t.probabilities.data() + r * padded + i), _mm512_cvtepi32_epi8(code));
      }
      float sum = float(_mm512_reduce_add_epi32(total));
      for (int64_t n = 0; n < g.rows; ++n) {
        const float *q = query + (first + r) * stride, *k = g.key + (head * g.rows + n) * s.width;
        __m512 dot = _mm512_setzero_ps();
        for (int64_t i = 0; i < s.width; i += kLanes) {
          const __mmask16 m = lanes(s.width - i);
          dot = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(m, q + i), _mm512_maskz_loadu_ps(m, k + i), dot);
        }
        const float logit = _mm512_reduce_add_ps(dot) * scaling * log2e + g.bias;
        mass[r][n] = 255.0f * _mm512_cvtss_f32(exp2(_mm512_set1_ps(std::min(logit - highest, 100.0f))));
        sum += mass[r][n];
      }
      inverse_total[r] = 1.0f / sum;
    }
    for (int64_t r = rows; r < kRows; ++r) std::memset(t.probabilities.data() + r * padded, 0, padded);

    float* result = t.query_float.data();
    int64_t c = 0;
    for (; c + 4 * kLanes <= channels; c += 4 * kLanes) value_tile<4>(t, s, c, result);
    const int64_t left = (channels - c) / kLanes;
    if (left == 3) value_tile<3>(t, s, c, result);
    if (left == 2) value_tile<2>(t, s, c, result);
    if (left == 1) value_tile<1>(t, s, c, result);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t place = out_offset + (first + r) * out_stride;
      for (int64_t i = 0; i < s.width; i += kLanes) {
        const __mmask16 m = lanes(s.width - i);
        __m512 o = _mm512_loadu_ps(result + r * channels + i);
        for (int64_t n = 0; n < g.rows; ++n)
          o = _mm512_fmadd_ps(_mm512_set1_ps(mass[r][n]), _mm512_maskz_loadu_ps(m, g.value + (head * g.rows + n) * s.width + i), o);
        o = _mm512_mul_ps(o, _mm512_set1_ps(inverse_total[r]));
        if (out.codes == nullptr) {
          _mm512_mask_storeu_ps(out.real + place + i, m, o);
        } else {
          _mm_mask_storeu_epi8(out.codes + place + i, m, out.quantizer(o));
        }
      }
    }
  }
}

}  // namespace

at::Tensor regcache::attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& register_key,
                     const std::optional<at::Tensor>& register_value, int64_t heads, double scaling, double logit_bias,
                     double inverse, int64_t zero_point, int64_t highest) {
  const Shape s{q.size(0), q.size(1), heads, q.size(2) / heads};
  const Registers g = check_attention(q, k, v, register_key, register_value, heads, logit_bias * 1.4426950408889634);  // log2(tau)
  at::Tensor out = at::empty({s.batch, s.tokens, heads * s.width}, q.options().dtype(inverse > 0 ? at::kByte : at::kFloat));
  Output target;
  if (inverse > 0) target = {nullptr, out.data_ptr<uint8_t>(), Quantizer(inverse, zero_point, highest)};
  else target.real = out.data_ptr<float>();
  const float *qp = q.const_data_ptr<float>(), *kp = k.const_data_ptr<float>(), *vp = v.const_data_ptr<float>();
  const int64_t image = q.stride(0), token = q.stride(1);
  at::parallel_for(0, s.batch * heads, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(s);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / heads, h = task % heads, offset = b * image + h * s.width;
      attend(qp + offset, kp + offset, vp + offset, token, h, float(scaling), s, g, target,
             b * s.tokens * heads * s.width + h * s.width, scratch);
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(regcache, CPU, m) {
  m.impl("quantize", &quantize);
  m.impl("layer_norm_quantize", &regcache::layer_norm_quantize);
  m.impl("attention", &regcache::attention);
}
