// Checks of what the operators are given. A message names the operator and the argument, what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <ostream>

namespace regcache {

using Maybe = std::optional<at::Tensor>;

constexpr int64_t kLongestSum = 65536;  // products of 8-bit codes that surely fit 32 bits: 255 * 128 * 65536 < 2^31

// of an argument, or of an entry of a list
struct Name {
  const char* text;
  int entry = -1;
  Name(const char* text, int entry = -1) : text(text), entry(entry) {}
};

inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << '`' << name.text;
  if (name.entry >= 0) out << '[' << name.entry << ']';
  return out << '`';
}

// Methods are not inlined: the text of every message would be compiled at every use.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  // a dense CPU tensor of the dtype, with `axes` axes (any number if negative)
  [[gnu::noinline]] void tensor(Name name, const at::Tensor& t, at::ScalarType dtype, int64_t axes) const {
    TORCH_CHECK(t.defined() && t.device().is_cpu() && t.layout() == at::kStrided, "regcache::", op_, ": ", name,
                " must be a dense CPU tensor, got ", t.defined() ? t.toString() : "none");
    TORCH_CHECK(t.scalar_type() == dtype, "regcache::", op_, ": ", name, " must have dtype ", dtype, ", got ", t.scalar_type());
    TORCH_CHECK(axes < 0 || t.dim() == axes, "regcache::", op_, ": ", name, " must have ", axes, " axes, got shape ", t.sizes());
  }
  // the same with all sizes given
  [[gnu::noinline]] void shape(Name name, const at::Tensor& t, at::ScalarType dtype, at::IntArrayRef sizes) const {
    tensor(name, t, dtype, -1);
    TORCH_CHECK(t.sizes() == sizes, "regcache::", op_, ": ", name, " must have shape ", sizes, ", got ", t.sizes());
  }
  [[gnu::noinline]] void contiguous(Name name, const at::Tensor& t) const {
    TORCH_CHECK(t.is_contiguous(), "regcache::", op_, ": ", name, " must be contiguous, got strides ", t.strides());
  }
  [[gnu::noinline]] void between(Name name, int64_t value, int64_t low, int64_t high) const {
    TORCH_CHECK(low <= value && value <= high, "regcache::", op_, ": ", name, " must be between ", low, " and ", high, ", got ",
                value);
  }
  [[gnu::noinline]] void positive(Name name, double value) const {  // as a float32 too
    TORCH_CHECK(std::isfinite(float(value)) && value > 0, "regcache::", op_, ": ", name, " must be positive and finite, got ",
                value);
  }
  [[gnu::noinline]] void finite(Name name, double value) const {
    TORCH_CHECK(std::isfinite(float(value)), "regcache::", op_, ": ", name, " must be finite, got ", value);
  }
  [[gnu::noinline]] void length(Name name, size_t found, size_t expected) const {
    TORCH_CHECK(found == expected, "regcache::", op_, ": ", name, " must have ", expected, " entries, got ", found);
  }
  // codes of a quantizer
  [[gnu::noinline]] void codes(double inverse, int64_t zero_point, int64_t highest) const {
    positive("inverse", inverse);
    between("highest", highest, 1, 255);
    between("zero_point", zero_point, 0, highest);
  }
  // an activation function in oneDNN's words
  [[gnu::noinline]] void activation(c10::string_view post, c10::string_view algorithm) const {
    TORCH_CHECK(post == "none" || post == "relu" || post == "swish" || post == "gelu", "regcache::", op_,
                ": `post` must be one of none, relu, swish, gelu, got '", post, "'");
    TORCH_CHECK(post != "gelu" || algorithm == "none" || algorithm == "tanh", "regcache::", op_,
                ": `algorithm` of gelu must be none or tanh, got '", algorithm, "'");
  }

 private:
  const char* op_;
};

}  // namespace regcache
