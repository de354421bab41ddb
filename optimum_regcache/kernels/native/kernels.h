// What each library computes in its own instructions: avx2_*.cpp and vnni_*.cpp. operators.cpp checks arguments, allocates and
// divides the work among threads.
#pragma once

#include <cstdint>

namespace regcache {

constexpr int64_t kMaxWidth = 128, kMaxRegisters = 16;  // of attention: head_dim, register rows

// u8 code = clamp(round(x * inverse) + zero_point, 0, highest), ties to even
struct Codes {
  float inverse = 0.0f;
  int32_t zero_point = 0, highest = 255;
};

void quantize_values(const float* x, uint8_t* out, int64_t count, const Codes& codes);

struct Norm {
  const float *weight, *bias;  // [width]
  int64_t width;
  float eps;
};

// LayerNorm of rows, then codes
void layer_norm_rows(const float* x, uint8_t* out, int64_t rows, const Norm& norm, const Codes& codes);

struct Attention {
  const float *query, *key, *value;  // [batch, tokens, heads * width], `image` and `token` apart
  int64_t image, token;
  int64_t batch, tokens, heads, width;  // width = head_dim
  float scaling;
  const float *register_key, *register_value;  // [heads, registers, width]
  int64_t registers;
  double logit_bias;  // of the registers, natural logarithm
  float* real;        // [batch, tokens, heads * width]; or, where it is null:
  uint8_t* out;
  Codes codes;
};

// heads `begin` to `end` of batch * heads
void attend(const Attention& a, int64_t begin, int64_t end);

}  // namespace regcache
