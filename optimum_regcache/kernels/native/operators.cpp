// The operators that both libraries have: quantize, LayerNorm + quantize, int8 attention with register rows. Every one has a
// plain PyTorch twin in kernels/fused_ops.py. The loops are in avx2_*.cpp and vnni_*.cpp.

#include "operators.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "kernels.h"

namespace regcache {

static Codes make_codes(double inverse, int64_t zero_point, int64_t highest) {
  return {float(inverse), int32_t(zero_point), int32_t(highest)};
}

static at::Tensor quantize(const at::Tensor& x, double inverse, int64_t zero_point, int64_t highest) {
  const Check check("quantize");
  check.tensor("x", x, at::kFloat, -1);
  check.codes(inverse, zero_point, highest);
  const at::Tensor in = x.contiguous();
  at::Tensor out = at::empty(in.sizes(), in.options().dtype(at::kByte));
  const float* source = in.const_data_ptr<float>();
  uint8_t* target = out.data_ptr<uint8_t>();
  const Codes codes = make_codes(inverse, zero_point, highest);
  at::parallel_for(0, in.numel(), 16384,
                   [&](int64_t begin, int64_t end) { quantize_values(source + begin, target + begin, end - begin, codes); });
  return out;
}

at::Tensor layer_norm_quantize(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps, double inverse,
                               int64_t zero_point, int64_t highest) {
  const Check check("layer_norm_quantize");
  check.tensor("x", x, at::kFloat, -1);
  TORCH_CHECK(x.dim() > 0, "regcache::layer_norm_quantize: `x` must have an axis to normalise, got a single number");
  const int64_t width = x.size(-1);
  check.shape("weight", weight, at::kFloat, {width});
  check.shape("bias", bias, at::kFloat, {width});
  TORCH_CHECK(eps >= 0 && std::isfinite(eps), "regcache::layer_norm_quantize: `eps` must be at least 0 and finite, got ", eps);
  check.codes(inverse, zero_point, highest);
  const at::Tensor in = x.contiguous(), w = weight.contiguous(), b = bias.contiguous();
  at::Tensor out = at::empty(in.sizes(), in.options().dtype(at::kByte));
  const int64_t rows = width ? in.numel() / width : 0;
  const float* source = in.const_data_ptr<float>();
  uint8_t* target = out.data_ptr<uint8_t>();
  const Codes codes = make_codes(inverse, zero_point, highest);
  const Norm norm{w.const_data_ptr<float>(), b.const_data_ptr<float>(), width, float(eps)};
  at::parallel_for(0, rows, std::max<int64_t>(1, 8192 / std::max<int64_t>(width, 1)), [&](int64_t begin, int64_t end) {
    layer_norm_rows(source + begin * width, target + begin * width, end - begin, norm, codes);
  });
  return out;
}

static void check_attention(const Check& check, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const Maybe& register_key, const Maybe& register_value, int64_t heads) {
  check.tensor("q", q, at::kFloat, 3);
  TORCH_CHECK(heads > 0 && q.size(2) > 0 && q.size(2) % heads == 0,
              "regcache::attention: `heads` must be a positive divisor of the last axis of `q`, ", q.size(2), ", got ", heads);
  const int64_t width = q.size(2) / heads;
  TORCH_CHECK(width <= kMaxWidth, "regcache::attention: head_dim must be at most ", kMaxWidth, ", got ", width);
  TORCH_CHECK(q.size(1) <= kLongestSum, "regcache::attention: `q` may have ", kLongestSum, " tokens at most, got ", q.size(1));
  TORCH_CHECK(q.size(2) == 1 || q.stride(2) == 1, "regcache::attention: the last stride of `q` must be 1, got ", q.stride(2));
  const auto like_query = [&](const char* name, const at::Tensor& t) {
    check.shape(name, t, at::kFloat, q.sizes());
    TORCH_CHECK(t.strides() == q.strides(), "regcache::attention: `", name, "` must have the strides of `q`, ", q.strides(),
                ", got ", t.strides());
  };
  like_query("k", k);
  like_query("v", v);
  TORCH_CHECK(register_key.has_value() == register_value.has_value(),
              "regcache::attention: `register_key` and `register_value` must both be given or both be None, got only `",
              register_key.has_value() ? "register_key" : "register_value", "`");
  if (!register_key.has_value()) return;
  check.tensor("register_key", *register_key, at::kFloat, 3);
  const int64_t rows = register_key->size(1);
  TORCH_CHECK(rows <= kMaxRegisters, "regcache::attention: at most ", kMaxRegisters, " register rows, got ", rows);
  check.shape("register_key", *register_key, at::kFloat, {heads, rows, width});
  check.shape("register_value", *register_value, at::kFloat, {heads, rows, width});
}

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Maybe& register_key,
                     const Maybe& register_value, int64_t heads, double scaling, double logit_bias, double inverse,
                     int64_t zero_point, int64_t highest) {
  const Check check("attention");
  check_attention(check, q, k, v, register_key, register_value, heads);
  check.finite("scaling", scaling);
  check.finite("logit_bias", logit_bias);
  const bool as_codes = inverse != 0;  // 0: real numbers leave
  if (as_codes) check.codes(inverse, zero_point, highest);
  at::Tensor out = at::empty(q.sizes(), q.options().dtype(as_codes ? at::kByte : at::kFloat));
  Attention a{};
  a.query = q.const_data_ptr<float>(), a.key = k.const_data_ptr<float>(), a.value = v.const_data_ptr<float>();
  a.image = q.stride(0), a.token = q.stride(1);
  a.batch = q.size(0), a.tokens = q.size(1), a.heads = heads, a.width = q.size(2) / heads;
  a.scaling = float(scaling), a.logit_bias = logit_bias;
  at::Tensor keys, values;  // own the memory
  if (register_key.has_value()) {
    keys = register_key->contiguous(), values = register_value->contiguous();
    a.register_key = keys.const_data_ptr<float>(), a.register_value = values.const_data_ptr<float>();
    a.registers = keys.size(1);
  }
  if (as_codes) {
    a.out = out.data_ptr<uint8_t>(), a.codes = make_codes(inverse, zero_point, highest);
  } else {
    a.real = out.data_ptr<float>();
  }
  at::parallel_for(0, a.batch * heads, 1, [&](int64_t begin, int64_t end) { attend(a, begin, end); });
  return out;
}

}  // namespace regcache

TORCH_LIBRARY(regcache, m) {
  m.def("quantize(Tensor x, float inverse, int zero_point, int highest) -> Tensor");
  m.def(
      "layer_norm_quantize(Tensor x, Tensor weight, Tensor bias, float eps, float inverse, int zero_point, int highest) -> "
      "Tensor");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? register_key, Tensor? register_value, int heads, float scaling, "
      "float logit_bias, float inverse, int zero_point, int highest) -> Tensor");
  m.def("delete_tokens(Tensor x, int lead, int count) -> (Tensor, Tensor, Tensor)");
  m.def("restore_tokens(Tensor x, Tensor kept, Tensor dropped, int lead, int rows, int columns) -> Tensor");
}

TORCH_LIBRARY_IMPL(regcache, CPU, m) {
  m.impl("quantize", &regcache::quantize);
  m.impl("layer_norm_quantize", &regcache::layer_norm_quantize);
  m.impl("attention", &regcache::attention);
}
