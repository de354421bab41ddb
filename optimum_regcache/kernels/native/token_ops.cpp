// Deletion of outlier tokens and the fill of their places, each as one operator. The plain PyTorch form, which also covers
// masks and other rules, is registers/deletion.py; results are the same up to the order of float32 sums.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"

namespace {

// x: float32 [B, N, D] -> (kept tokens [B, N - count, D], their positions int64 [B, N - count], dropped bool [B, N]).
// Drops the `count` tokens of largest l_inf norm after the first `lead`; of equal norms the earlier token goes.
std::tuple<at::Tensor, at::Tensor, at::Tensor> delete_tokens(const at::Tensor& x, int64_t lead, int64_t count) {
  const regcache::Check check("delete_tokens");
  check.tensor("x", x, at::kFloat, 3);
  const at::Tensor in = x.contiguous();
  const int64_t batch = in.size(0), tokens = in.size(1), width = in.size(2), left = tokens - count;
  TORCH_CHECK(width > 0, "regcache::delete_tokens: `x` must have channels, got shape ", x.sizes());
  check.between("lead", lead, 0, tokens);
  TORCH_CHECK(0 < count && count <= (tokens - lead) / 2,
              "regcache::delete_tokens: `count` must be at least 1 and at most half of the ", tokens - lead, " patches, got ",
              count);
  at::Tensor out = at::empty({batch, left, width}, in.options());
  at::Tensor kept = at::empty({batch, left}, in.options().dtype(at::kLong));
  at::Tensor dropped = at::empty({batch, tokens}, in.options().dtype(at::kBool));
  const float* source = in.const_data_ptr<float>();
  float* target = out.data_ptr<float>();
  int64_t* positions = kept.data_ptr<int64_t>();
  bool* gone = dropped.data_ptr<bool>();
  std::vector<float> norms(batch * tokens);
  at::parallel_for(0, batch * tokens, std::max<int64_t>(1, 16384 / width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float top = 0.0f;
      for (int64_t i = 0; i < width; ++i) top = std::max(top, std::fabs(source[r * width + i]));
      norms[r] = top;
    }
  });
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> order(tokens - lead);
    for (int64_t b = begin; b < end; ++b) {
      const float* norm = norms.data() + b * tokens;
      for (int64_t i = 0; i < tokens - lead; ++i) order[i] = lead + i;
      std::partial_sort(order.begin(), order.begin() + count, order.end(),
                        [&](int64_t i, int64_t j) { return norm[i] != norm[j] ? norm[i] > norm[j] : i < j; });
      std::fill(gone + b * tokens, gone + (b + 1) * tokens, false);
      for (int64_t i = 0; i < count; ++i) gone[b * tokens + order[i]] = true;
      for (int64_t n = 0, k = 0; n < tokens; ++n)
        if (!gone[b * tokens + n]) positions[b * left + k++] = n;
    }
  });
  at::parallel_for(0, batch * left, std::max<int64_t>(1, 16384 / width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      std::memcpy(target + r * width, source + (r / left * tokens + positions[r]) * width, width * sizeof(float));
  });
  return {out, kept, dropped};
}

// `kept` must name every place that `dropped` leaves, once and in ascending order: else an output would stay unwritten, or lie
// outside.
void check_kept(const int64_t* kept, const bool* dropped, int64_t batch, int64_t left, int64_t tokens) {
  for (int64_t b = 0; b < batch; ++b) {
    int64_t k = 0;
    for (int64_t n = 0; n < tokens; ++n) {
      if (dropped[b * tokens + n]) continue;
      TORCH_CHECK(k < left && kept[b * left + k] == n,
                  "regcache::restore_tokens: `kept` must be the ascending positions that `dropped`", " leaves, among ", tokens,
                  "; of image ", b, " entry ", k, " must be ", n, ", got ",
                  k < left ? std::to_string(kept[b * left + k]) : "none");
      ++k;
    }
    TORCH_CHECK(k == left, "regcache::restore_tokens: `kept` must have as many positions as `dropped` leaves, ", k, " for image ",
                b, ", got ", left);
  }
}

// x: float32 [B, K, D] at `kept` of `dropped`.size(1) places -> [B, N, D]; each deleted patch gets the mean of its kept
// 8-neighbours on the grid, or the mean of all kept patches where none is left.
at::Tensor restore_tokens(const at::Tensor& x, const at::Tensor& kept, const at::Tensor& dropped, int64_t lead, int64_t rows,
                          int64_t columns) {
  const regcache::Check check("restore_tokens");
  check.tensor("x", x, at::kFloat, 3);
  check.tensor("dropped", dropped, at::kBool, 2);
  const at::Tensor in = x.contiguous(), places = kept.contiguous(), mask = dropped.contiguous();
  const int64_t batch = in.size(0), left = in.size(1), width = in.size(2), tokens = mask.size(1);
  TORCH_CHECK(width > 0, "regcache::restore_tokens: `x` must have channels, got shape ", x.sizes());
  check.shape("dropped", dropped, at::kBool, {batch, tokens});
  check.shape("kept", kept, at::kLong, {batch, left});
  check.between("lead", lead, 0, tokens);
  check.between("rows", rows, 1, tokens);
  check.between("columns", columns, 1, tokens);
  TORCH_CHECK(lead + rows * columns == tokens, "regcache::restore_tokens: `lead` + `rows` * `columns` must be the ", tokens,
              " tokens of `dropped`, got ", lead, " + ", rows, " * ", columns);
  check_kept(places.const_data_ptr<int64_t>(), mask.const_data_ptr<bool>(), batch, left, tokens);
  at::Tensor out = at::empty({batch, tokens, width}, in.options());
  const float* source = in.const_data_ptr<float>();
  const int64_t* positions = places.const_data_ptr<int64_t>();
  const bool* gone = mask.const_data_ptr<bool>();
  float* target = out.data_ptr<float>();
  at::parallel_for(0, batch * left, std::max<int64_t>(1, 16384 / width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      std::memcpy(target + (r / left * tokens + positions[r]) * width, source + r * width, width * sizeof(float));
  });
  at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> from;
    for (int64_t b = begin; b < end; ++b) {
      const bool* is_gone = gone + b * tokens;
      for (int64_t n = lead; n < tokens; ++n) {
        if (!is_gone[n]) continue;
        from.clear();
        const int64_t row = (n - lead) / columns, column = (n - lead) % columns;
        for (int64_t y = std::max<int64_t>(row - 1, 0); y <= std::min(row + 1, rows - 1); ++y)
          for (int64_t z = std::max<int64_t>(column - 1, 0); z <= std::min(column + 1, columns - 1); ++z)
            if (!is_gone[lead + y * columns + z]) from.push_back(lead + y * columns + z);
        if (from.empty())
          for (int64_t m = lead; m < tokens; ++m)
            if (!is_gone[m]) from.push_back(m);
        float* cell = target + (b * tokens + n) * width;
        std::fill(cell, cell + width, 0.0f);
        for (const int64_t m : from)
          for (int64_t i = 0; i < width; ++i) cell[i] += target[(b * tokens + m) * width + i];
        for (int64_t i = 0; i < width; ++i) cell[i] /= float(std::max<size_t>(from.size(), 1));
      }
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(regcache, CPU, m) {
  m.impl("delete_tokens", &delete_tokens);
  m.impl("restore_tokens", &restore_tokens);
}
