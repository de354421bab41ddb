// What block_op.cpp calls of operators.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include "checks.h"

namespace regcache {

at::Tensor layer_norm_quantize(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps, double inverse,
                               int64_t zero_point, int64_t highest);

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Maybe& register_key,
                     const Maybe& register_value, int64_t heads, double scaling, double logit_bias, double inverse,
                     int64_t zero_point, int64_t highest);

}  // namespace regcache
