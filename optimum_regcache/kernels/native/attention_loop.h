// int8 attention with register rows, the same for all instructions; `Head` computes the products of one head in its own. The
// plain form is int8_attention_reference in kernels/fused_ops.py.
//
// Head keeps what one thread needs for one head, allocated for tokens and width, and has
//   kRows                        query rows that it multiplies at a time
//   kPerNat, kMost               unit of its logits in natural logarithms; largest exponent that it can take
//   pack_keys(x, stride)         one scale per token
//   pack_values(x, stride)       one scale per channel
//   round_query(x, r)            query of row r as codes; returns their scale
//   multiply_keys(rows, scale)   logits of `rows` rows, the scale of each given
//   softmax(r, top)              u8 probabilities relative to the largest logit `top` of an image token; returns their sum
//   multiply_values(rows)        output of `rows` rows, not normalised
//   write(a, r, mass, rows, factor, place)
//                                (row r of it + mass[n] times register row n) * factor, to a.real or as codes to a.out
//   dot(x, y), exp(x)            in float32
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace regcache {

template <class Head>
void attend_head(const Attention& a, const float* query, const float* key, const float* value, int64_t head, int64_t place,
                 Head& t) {
  constexpr int64_t kRows = Head::kRows;
  const float scaling = a.scaling * float(Head::kPerNat), bias = float(a.logit_bias * Head::kPerNat);
  const int64_t first_register = head * a.registers * a.width;
  t.pack_keys(key, a.token);
  t.pack_values(value, a.token);
  float mass[kRows][kMaxRegisters];
  for (int64_t first = 0; first < a.tokens; first += kRows) {
    const int64_t rows = std::min(kRows, a.tokens - first);
    float row_scale[kRows] = {}, inverse_total[kRows];
    for (int64_t r = 0; r < rows; ++r) row_scale[r] = t.round_query(query + (first + r) * a.token, r) * scaling;
    t.multiply_keys(rows, row_scale);
    for (int64_t r = 0; r < rows; ++r) {
      float top, total = t.softmax(r, top);
      for (int64_t n = 0; n < a.registers; ++n) {  // registers stay outside the range of the codes
        const float logit = t.dot(query + (first + r) * a.token, a.register_key + first_register + n * a.width) * scaling + bias;
        mass[r][n] = 255.0f * t.exp(std::min(logit - top, Head::kMost));
        total += mass[r][n];
      }
      inverse_total[r] = 1.0f / total;
    }
    t.multiply_values(rows);
    for (int64_t r = 0; r < rows; ++r)
      t.write(a, r, mass[r], a.register_value + first_register, inverse_total[r], place + (first + r) * a.heads * a.width);
  }
}

template <class Head>
void attend_heads(const Attention& a, int64_t begin, int64_t end) {
  Head scratch(a.tokens, a.width);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.heads, h = task % a.heads, offset = b * a.image + h * a.width;
    attend_head(a, a.query + offset, a.key + offset, a.value + offset, h, (b * a.tokens * a.heads + h) * a.width, scratch);
  }
}

}  // namespace regcache
