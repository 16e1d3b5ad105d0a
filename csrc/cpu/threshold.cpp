// threshold: tensors in, competitions out. One for all weights together, or one for each.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "denormals.h"
#include "parallel.h"
#include "select.h"
#include "tensors.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

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

bool is_float64(const Strided& weight) {
  return weight.dtype == Dtype::kFloat64;
}

Tensor counts_of(const std::vector<int64_t>& counts) {
  Tensor result = torch::stable::empty({static_cast<int64_t>(counts.size())}, torch::headeronly::ScalarType::Long);
  std::ranges::copy(counts, static_cast<int64_t*>(result.mutable_data_ptr()));
  return result;
}

Tensor threshold(const std::vector<Tensor> weights, std::optional<Tensor> scales, const std::vector<int64_t> removed,
                 const std::vector<Tensor> masks, const std::vector<std::optional<Tensor>> bases) {
  const KeepDenormals exact;
  check_weights(weights);
  check_masks(masks, weights);
  check_bases(bases, weights);
  const size_t n = weights.size();
  STD_TORCH_CHECK(removed.size() == 1 || removed.size() == n, "expected one count, or one per weight");
  const std::vector<double> factors = scales_of(scales, n);
  Competition all{strided_of(weights), strided_of(masks), strided_of(bases), factors};
  all.wide = std::ranges::any_of(all.weights, is_float64);
  const int64_t total = elements_of(all.weights);
  for (size_t i = 0; i < removed.size(); ++i) {
    const int64_t limit = removed.size() == 1 ? total : all.weights[i].numel;
    STD_TORCH_CHECK(0 <= removed[i] && removed[i] <= limit, "cannot remove ", removed[i], " of ", limit);
  }
  if (removed.size() == 1) {
    all.removed = removed[0];
    return counts_of(select_masks(all));
  }
  std::vector<int64_t> nonfinite(n);
  const auto select_one = [&](int64_t i) {
    Competition one{{all.weights[i]}, {all.masks[i]}, {}, {}, false, all.wide, removed[i]};
    if (!all.bases.empty() && all.bases[i].has_value()) {
      one.bases = {all.bases[i]};
    }
    if (!factors.empty()) {
      one.scales = {factors[i]};
    }
    nonfinite[i] = select_masks(one)[0];
  };
  // Most weights are worth one thread each, the largest first. Only one that would keep a thread busy while the
  // others have nothing left is shared by all of them.
  const int64_t one_thread = thread_count() == 1 ? total : std::max(2 * kChunk, total / (2 * thread_count()));
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::ranges::sort(order, std::greater<>(), [&](int64_t i) { return all.weights[i].numel; });
  size_t shared = 0;
  for (; shared < n && all.weights[order[shared]].numel > one_thread; ++shared) {
    select_one(order[shared]);
  }
  share_tasks(static_cast<int64_t>(n - shared), total,
              [&](int64_t task, int64_t) { select_one(order[shared + task]); });
  return counts_of(nonfinite);
}

Tensor normalized_threshold(const std::vector<Tensor> weights, int64_t removed, const std::vector<Tensor> masks,
                            const std::vector<std::optional<Tensor>> bases) {
  const KeepDenormals exact;
  check_weights(weights);
  check_masks(masks, weights);
  check_bases(bases, weights);
  Competition all{strided_of(weights), strided_of(masks), strided_of(bases), {}, true};
  all.removed = removed;
  const int64_t total = elements_of(all.weights);
  STD_TORCH_CHECK(std::ranges::none_of(all.weights, is_float64), "squares of float64 can leave its range: use norms");
  STD_TORCH_CHECK(0 <= removed && removed <= total, "cannot remove ", removed, " of ", total);
  return counts_of(select_masks(all));
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("threshold", TORCH_BOX(&pyprune::threshold));
  m.impl("normalized_threshold", TORCH_BOX(&pyprune::normalized_threshold));
}
