// A whole transformer block as one operator: the same calls that fusion/block.py makes one by one, without Python between
// them. A batch that divides well among the threads is processed in groups of images, each group by one thread from the first
// LayerNorm to the last product: no thread waits for another inside a block, and a group's tensors stay in its core's cache.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "checks.h"
#include "operators.h"
#include "threads.h"

namespace {

using regcache::Check;
using regcache::Maybe;
using Scalars = c10::List<std::optional<at::Scalar>>;

constexpr int64_t kGroup = 2;  // images that one thread takes at a time

// oneDNN product of u8 codes with a packed weight; see kernels/onednn.py
struct Gemm {
  at::Tensor packed, scale, zero;
  Maybe bias;
  double input_scale;
  int64_t input_zero;

  at::Tensor operator()(const at::Tensor& codes, double out_scale, int64_t out_zero, at::ScalarType dtype, c10::string_view post,
                        c10::string_view algorithm) const {
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("onednn::qlinear_pointwise", "")
            .typed<at::Tensor(at::Tensor, double, int64_t, at::Tensor, at::Tensor, at::Tensor, Maybe, double, int64_t,
                              std::optional<at::ScalarType>, c10::string_view, Scalars, c10::string_view)>();
    return op.call(codes, input_scale, input_zero, packed, scale, zero, bias, out_scale, out_zero, dtype, post, Scalars(),
                   algorithm);
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

// The shapes of a block of D channels: query, key and value side by side from D, back to D, D to the MLP's width, back to D.
void check_block(const at::Tensor& x, at::TensorList norms, at::ArrayRef<double> eps, at::TensorList packed,
                 at::TensorList scales, at::TensorList zeros, const c10::List<Maybe>& biases, at::ArrayRef<double> input_scales,
                 at::IntArrayRef input_zeros, at::ArrayRef<double> inverses, int64_t heads) {
  const Check check("block");
  check.tensor("x", x, at::kFloat, 3);
  check.length("norms", norms.size(), 4), check.length("eps", eps.size(), 2);
  check.length("packed", packed.size(), 4), check.length("scales", scales.size(), 4), check.length("zeros", zeros.size(), 4);
  check.length("biases", biases.size(), 4), check.length("input_scales", input_scales.size(), 4);
  check.length("input_zeros", input_zeros.size(), 4), check.length("inverses", inverses.size(), 4);
  for (int i = 0; i < 4; ++i) {
    TORCH_CHECK(packed[i].defined() && packed[i].is_mkldnn() && packed[i].scalar_type() == at::kChar && packed[i].dim() == 2,
                "regcache::block: ", regcache::Name("packed", i),
                " must be an int8 weight [in, out] packed by onednn::qlinear_prepack, got ",
                packed[i].defined() ? packed[i].toString() : "none");
  }
  const int64_t width = x.size(2), inner = packed[1].size(0), hidden = packed[3].size(0);
  TORCH_CHECK(heads > 0 && inner % heads == 0, "regcache::block: `heads` must be a positive divisor of the ", inner,
              " inputs of `packed[1]`, got ", heads);
  const int64_t sizes[4][2] = {{width, 3 * inner}, {inner, width}, {width, hidden}, {hidden, width}};
  for (int i = 0; i < 4; ++i) {
    const at::IntArrayRef expected(sizes[i], 2), out(sizes[i] + 1, 1);
    TORCH_CHECK(packed[i].sizes() == expected, "regcache::block: ", regcache::Name("packed", i), " must have shape ", expected,
                " for `x` of shape ", x.sizes(), ", got ", packed[i].sizes());
    check.shape({"norms", i}, norms[i], at::kFloat, {width});
    check.shape({"scales", i}, scales[i], at::kFloat, out), check.contiguous({"scales", i}, scales[i]);
    check.shape({"zeros", i}, zeros[i], at::kLong, out), check.contiguous({"zeros", i}, zeros[i]);
    const Maybe bias = biases.get(i);
    if (bias.has_value()) check.shape({"biases", i}, *bias, at::kFloat, out), check.contiguous({"biases", i}, *bias);
    check.positive({"input_scales", i}, input_scales[i]), check.positive({"inverses", i}, inverses[i]);
    check.between({"input_zeros", i}, input_zeros[i], 0, 255);
  }
}

at::Tensor block(const at::Tensor& input, at::TensorList norms, at::ArrayRef<double> eps, at::TensorList packed,
                 at::TensorList scales, at::TensorList zeros, const c10::List<Maybe>& biases, at::ArrayRef<double> input_scales,
                 at::IntArrayRef input_zeros, at::ArrayRef<double> inverses, double hidden_scale, int64_t hidden_zero,
                 c10::string_view post, c10::string_view algorithm, const Maybe& register_key, const Maybe& register_value,
                 int64_t heads, double scaling, double logit_bias) {
  check_block(input, norms, eps, packed, scales, zeros, biases, input_scales, input_zeros, inverses, heads);
  const Check check("block");
  check.positive("hidden_scale", hidden_scale);
  check.between("hidden_zero", hidden_zero, 0, 255);
  check.activation(post, algorithm);
  if (input.numel() == 0) return at::empty(input.sizes(), input.options());
  const at::Tensor x = input.contiguous();
  const int64_t batch = x.size(0);
  Gemm gemms[4];
  for (int i = 0; i < 4; ++i) gemms[i] = {packed[i], scales[i], zeros[i], biases.get(i), input_scales[i], input_zeros[i]};
  at::Tensor out = at::empty(x.sizes(), x.options());

  const auto run = [&](int64_t first, int64_t count) {
    const at::Tensor from = x.narrow(0, first, count), to = out.narrow(0, first, count);
    const at::Tensor codes = regcache::layer_norm_quantize(from, norms[0], norms[1], eps[0], inverses[0], input_zeros[0], 255);
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
    const regcache::OneThread one;                        // oneDNN plans for as many threads as it is told
    for (int64_t t = begin; t < end; ++t)
      for (int64_t first = t * each; first < std::min(batch, (t + 1) * each); first += kGroup)
        run(first, std::min({kGroup, batch - first, (t + 1) * each - first}));
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
