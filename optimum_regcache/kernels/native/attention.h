// What both attention operators are given, checked.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace regcache {

constexpr int64_t kMaxWidth = 128, kMaxRegisters = 16;  // head_dim, register rows

struct Registers {
  at::Tensor keys, values;                       // own the memory
  const float *key = nullptr, *value = nullptr;  // [heads, rows, width]
  int64_t rows = 0;
  float bias = 0.0f;  // of the logits, in the unit of the caller's exponential
};

// q, k, v: float32 [B, N, H * d], last stride 1, same strides; register_key, register_value: float32 [H, n, d]
inline Registers check_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                 const std::optional<at::Tensor>& register_key, const std::optional<at::Tensor>& register_value,
                                 int64_t heads, double bias) {
  const int64_t width = q.size(2) / heads;
  TORCH_CHECK(width <= kMaxWidth, "regcache::attention: head_dim must be at most ", kMaxWidth, ", got ", width);
  TORCH_CHECK(q.stride(2) == 1 && k.strides() == q.strides() && v.strides() == q.strides() && k.sizes() == q.sizes() &&
                  v.sizes() == q.sizes(),
              "regcache::attention: q, k and v must have the same sizes and strides, the last stride being 1");
  Registers g;
  if (!register_key.has_value()) return g;
  g.keys = register_key->contiguous(), g.values = register_value->contiguous();
  g.key = g.keys.const_data_ptr<float>(), g.value = g.values.const_data_ptr<float>();
  g.rows = g.keys.size(1), g.bias = float(bias);
  TORCH_CHECK(g.rows <= kMaxRegisters, "regcache::attention: at most ", kMaxRegisters, " register rows, got ", g.rows);
  TORCH_CHECK(g.keys.size(0) == heads && g.keys.size(2) == width && g.values.sizes() == g.keys.sizes(),
              "regcache::attention: register keys and values must be [", heads, ", rows, ", width, "]");
  return g;
}

}  // namespace regcache
