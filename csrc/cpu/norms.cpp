// norms: root of the sum of squares per tensor, in the fixed order of norm_order.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "../norm_order.h"
#include "denormals.h"
#include "norm_blocks.h"
#include "parallel.h"
#include "tensors.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

// Sums of squares of (factor * x) for each tensor.
std::vector<double> sums_of_squares(const std::vector<Strided>& views, double factor) {
  NormBlocks squares(views);
  const std::vector<Chunk> chunks = chunks_of(views);
  share_tasks(static_cast<int64_t>(chunks.size()), elements_of(views), [&](int64_t task, int64_t) {
    const Chunk& chunk = chunks[task];
    Room room;
    squares.add(chunk, views[chunk.tensor].in_a_row(chunk.start, chunk.count, room), factor);
  });
  std::vector<double> sums;
  for (size_t i = 0; i < views.size(); ++i) {
    sums.push_back(squares.of_weight(i));
  }
  return sums;
}

Tensor norms(const std::vector<Tensor> tensors) {
  const KeepDenormals exact;
  check_weights(tensors);
  const std::vector<Strided> views = strided_of(tensors);
  Tensor result = torch::stable::empty({static_cast<int64_t>(views.size())}, torch::headeronly::ScalarType::Double);
  double* out = static_cast<double*>(result.mutable_data_ptr());
  const std::vector<double> sums = sums_of_squares(views, 1.0);
  for (size_t i = 0; i < views.size(); ++i) {
    const bool in_range = sums[i] >= kSmallestSum && sums[i] < INFINITY;
    if (in_range || views[i].dtype != Dtype::kFloat64) {
      out[i] = std::sqrt(sums[i]);
    } else {
      // Squares of float64 left the range of float64: once more, scaled by a power of two.
      const double factor = sums[i] < INFINITY ? kScaleUp : kScaleDown;
      out[i] = std::sqrt(sums_of_squares({views[i]}, factor)[0]) / factor;
    }
  }
  return result;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("norms", TORCH_BOX(&pyprune::norms));
}
