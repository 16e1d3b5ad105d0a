// threshold: tensors in, competitions out. One for all weights together, or one for each.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "select.h"
#include "tensors.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

// Weights up to this size are worth one thread each; larger ones are shared by all threads, one after the other.
constexpr int64_t kOneThread = 2 * kChunk;

std::vector<double> scales_of(const std::optional<Tensor>& scales, size_t count) {
  if (!scales.has_value()) {
    return {};
  }
  STD_TORCH_CHECK(scales->scalar_type() == torch::headeronly::ScalarType::Double && scales->dim() == 1 &&
                      scales->numel() == static_cast<int64_t>(count),
                  "expected one float64 scale per weight");
  const Strided view = strided_of(*scales);
  std::vector<double> result(count);
  view.gather(0, static_cast<int64_t>(count), result.data());
  for (double& scale : result) {
    // Only a weight with a NaN has no usable scale, and its masks mean nothing; zero keeps the order well defined.
    scale = scale >= 0 && std::isfinite(scale) ? scale : 0.0;
  }
  return result;
}

Tensor threshold(const std::vector<Tensor> weights, std::optional<Tensor> scales, const std::vector<int64_t> removed,
                 const std::vector<Tensor> masks) {
  check_same_shapes(weights, masks);
  const size_t n = weights.size();
  STD_TORCH_CHECK(removed.size() == 1 || removed.size() == n, "expected one count, or one per weight");
  const std::vector<double> factors = scales_of(scales, n);
  Tensor result = torch::stable::empty({static_cast<int64_t>(n)}, torch::headeronly::ScalarType::Long);
  int64_t* nonfinite = static_cast<int64_t*>(result.mutable_data_ptr());

  Competition all{strided_of(weights), strided_of(masks), factors};
  all.wide = std::any_of(all.weights.begin(), all.weights.end(),
                         [](const Strided& w) { return w.dtype == Dtype::kFloat64; });
  if (removed.size() == 1) {
    all.removed = removed[0];
    std::ranges::copy(select_masks(all), nonfinite);
    return result;
  }
  const auto select_one = [&](int64_t i) {
    Competition one{{all.weights[i]}, {all.masks[i]}, {}, all.wide, removed[i]};
    if (!factors.empty()) {
      one.scales = {factors[i]};
    }
    nonfinite[i] = select_masks(one)[0];
  };
  std::vector<int64_t> small;
  for (size_t i = 0; i < n; ++i) {
    if (all.weights[i].numel <= kOneThread) {
      small.push_back(static_cast<int64_t>(i));
    } else {
      select_one(static_cast<int64_t>(i));
    }
  }
  share_tasks(static_cast<int64_t>(small.size()), [&](int64_t task, int64_t) { select_one(small[task]); });
  return result;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("threshold", TORCH_BOX(&pyprune::threshold));
}
