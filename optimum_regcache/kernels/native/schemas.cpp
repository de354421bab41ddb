// Schemas of the operators that both libraries have.

#include <torch/library.h>

TORCH_LIBRARY(regcache, m) {
  m.def("quantize(Tensor x, float inverse, int zero_point, int highest) -> Tensor");
  m.def("layer_norm_quantize(Tensor x, Tensor weight, Tensor bias, float eps, float inverse, int zero_point, int highest) -> Tensor");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? register_key, Tensor? register_value, int heads, float scaling, "
      "float logit_bias, float inverse, int zero_point, int highest) -> Tensor");
  m.def("delete_tokens(Tensor x, int lead, int count) -> (Tensor, Tensor, Tensor)");
  m.def("restore_tokens(Tensor x, Tensor kept, Tensor dropped, int lead, int rows, int columns) -> Tensor");
}
