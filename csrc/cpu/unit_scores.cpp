// unit_scores: sums, means or maxima of |x|^p over blocks, in the fixed order of unit_order.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <deque>

#include "../unit_order.h"
#include "../unit_schema.h"
#include "denormals.h"
#include "parallel.h"
#include "tensors.h"
#include "unit_sums.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

struct Task {
  UnitSums& sums;
  int64_t first, count;
};

std::vector<Tensor> unit_scores(const std::vector<Tensor> tensors, const std::vector<int64_t> blocks,
                                std::optional<double> p, int64_t reduction) {
  const KeepDenormals exact;
  const UnitTerm term = unit_term(p, reduction);
  const std::vector<Strided> views = strided_of(tensors);
  std::vector<Tensor> results;
  std::deque<UnitSums> all;
  std::vector<Task> tasks, rest;
  const int64_t* block = blocks.data();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    results.push_back(new_scores(tensor, block));
    const UnitDims dims(tensor.sizes().data(), tensor.strides().data(), block, tensor.dim());
    block += tensor.dim();
    if (views[i].numel == 0) {
      continue;
    }
    UnitSums& sums = all.emplace_back(views[i], dims, term, reduction == kMean, scores_are_wide(views[i].dtype),
                                      results.back().mutable_data_ptr());
    const int64_t together = std::max<int64_t>(1, kChunk / sums.elements_of_part());
    for (int64_t first = 0; first < sums.parts(); first += together) {
      tasks.push_back({sums, first, std::min(together, sums.parts() - first)});
    }
    for (int64_t tile = 0; tile < sums.unfinished(); ++tile) {
      rest.push_back({sums, tile, 1});
    }
  }
  std::vector<UnitSums::Rooms> rooms(thread_count());
  share_tasks(static_cast<int64_t>(tasks.size()), elements_of(views), [&](int64_t task, int64_t worker) {
    tasks[task].sums.add(tasks[task].first, tasks[task].count, rooms[worker]);
  });
  share_tasks(static_cast<int64_t>(rest.size()), elements_of(views) / kUnitSteps,
              [&](int64_t task, int64_t worker) { rest[task].sums.finish(rest[task].first, rooms[worker]); });
  return results;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("unit_scores", TORCH_BOX(&pyprune::unit_scores));
}
