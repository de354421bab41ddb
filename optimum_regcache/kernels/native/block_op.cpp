// A whole transformer block as one operator: the same calls that fusion/block.py makes one by one, without Python between
// them. A batch that divides well among the threads is processed in groups of images, each group by one thread from the first
// LayerNorm to the last product: no thread waits for another inside a block, and a group's tensors stay in its core's cache.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>

#include "fused_ops.h"

namespace {

using Maybe = std::optional<at::Tensor>;
using Scalars = c10::List<std::optional<at::Scalar>>;

constexpr int64_t kGroup = 2;  // images that one thread takes at a time

// oneDNN product of u8 codes with a packed weight; see kernels/onednn.py
struct Gemm {
  at::Tensor packed, scale, zero;
  Maybe bias;
  double input_scale;
  int64_t input_zero;

  at::Tensor operator()(const at::Tensor& codes, double out_scale, int64_t out_zero, at::ScalarType dtype,
                        c10::string_view post, c10::string_view algorithm) const {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("onednn::qlinear_pointwise", "")
                               .typed<at::Tensor(at::Tensor, double, int64_t, at::Tensor, at::Tensor, at::Tensor, Maybe, double,
                                                 int64_t, std::optional<at::ScalarType>, c10::string_view, Scalars,
                                                 c10::string_view)>();
    return op.call(codes, input_scale, input_zero, packed, scale, zero, bias, out_scale, out_zero, dtype, post, Scalars(), algorithm);
  }

  // sum += product, in place
  void accumulate(const at::Tensor& codes, const at::Tensor& sum) const {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("onednn::qlinear_pointwise", "binary")
                               .typed<at::Tensor(at::Tensor, double, int64_t, at::Tensor, at::Tensor, at::Tensor, Maybe, Maybe,
                                                 double, int64_t, std::optional<at::ScalarType>, double, int64_t,
                                                 c10::string_view, double, c10::string_view, Scalars, c10::string_view)>();
    op.call(codes, input_scale, input_zero, packed, scale, zero, sum, bias, 1.0, 0, at::kFloat, 1.0, 0, "sum", 1.0, "none",
            Scalars(), "");
  }
};

at::Tensor block(const at::Tensor& input, at::TensorList norms, at::ArrayRef<double> eps, at::TensorList packed,
                 at::TensorList scales, at::TensorList zeros, const c10::List<Maybe>& biases, at::ArrayRef<double> input_scales,
                 at::IntArrayRef input_zeros, at::ArrayRef<double> inverses, double hidden_scale, int64_t hidden_zero,
                 c10::string_view post, c10::string_view algorithm, const Maybe& register_key, const Maybe& register_value,
                 int64_t heads, double scaling, double logit_bias) {
  const at::Tensor x = input.contiguous();
  const int64_t batch = x.size(0);
  Gemm gemms[4];
  for (int i = 0; i < 4; ++i) gemms[i] = {packed[i], scales[i], zeros[i], biases.get(i), input_scales[i], input_zeros[i]};
  at::Tensor out = at::empty(x.sizes(), x.options());

  const auto run = [&](int64_t first, int64_t count) {
    const at::Tensor from = x.narrow(0, first, count), to = out.narrow(0, first, count);
    const at::Tensor codes =
        regcache::layer_norm_quantize(from, norms[0], norms[1], eps[0], inverses[0], input_zeros[0], 255);
    const auto qkv = gemms[0](codes, 1.0, 0, at::kFloat, "none", "").chunk(3, -1);
    const at::Tensor context = regcache::attention(qkv[0], qkv[1], qkv[2], register_key, register_value, heads, scaling,
                                                   logit_bias, inverses[1], input_zeros[1], 255);
    to.copy_(from);
    gemms[1].accumulate(context, to);
    const at::Tensor normed = regcache::layer_norm_quantize(to, norms[2], norms[3], eps[1], inverses[2], input_zeros[2], 255);
    gemms[3].accumulate(gemms[2](normed, hidden_scale, hidden_zero, at::kByte, post, algorithm), to);
  };

  const int64_t threads = at::get_num_threads(), each = (batch + threads - 1) / threads;
  const bool balanced = threads > 1 && batch >= threads && each * threads * 100 <= batch * 107;
  if (!balanced || at::in_parallel_region()) {
    run(0, batch);
    return out;
  }
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;  // thread-local; these threads have the default state
    const int before = omp_get_max_threads();
    omp_set_num_threads(1);  // oneDNN plans for as many threads as it is told
    for (int64_t t = begin; t < end; ++t)
      for (int64_t first = t * each; first < std::min(batch, (t + 1) * each); first += kGroup)
        run(first, std::min({kGroup, batch - first, (t + 1) * each - first}));
    omp_set_num_threads(before);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(regcache, m) {
  m.def(
      "block(Tensor x, Tensor[] norms, float[] eps, Tensor[] packed, Tensor[] scales, Tensor[] zeros, Tensor?[] biases, "
      "float[] input_scales, int[] input_zeros, float[] inverses, float hidden_scale, int hidden_zero, str post, "
      "str algorithm, Tensor? register_key, Tensor? register_value, int heads, float scaling, float logit_bias) -> Tensor");
}

// the packed weights have a layout of their own, which takes part in choosing the kernel
TORCH_LIBRARY_IMPL(regcache, CompositeExplicitAutograd, m) { m.impl("block", &block); }
