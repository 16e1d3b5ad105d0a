// norms: root of the sum of squares per tensor, in the fixed order of norm_order.h.
#include "kernels/norms.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "capability.h"
#include "denormals.h"
#include "parallel.h"
#include "tensors.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

static_assert(kChunk % kNormBlock == 0, "a chunk holds whole blocks");

// The block sums are a vector again: summed by the same rule until one number is left.
double reduce_blocks(std::vector<double> sums) {
  const auto block = PYPRUNE_KERNEL(sum_block);
  do {
    std::vector<double> next;
    for (size_t start = 0; start < sums.size(); start += kNormBlock) {
      next.push_back(block(sums.data() + start, std::min<int64_t>(kNormBlock, sums.size() - start)));
    }
    sums = std::move(next);
  } while (sums.size() > 1);
  return sums.empty() ? 0.0 : sums[0];
}

// Sums of squares of (factor * x) for each tensor.
std::vector<double> sums_of_squares(const std::vector<Strided>& views, double factor) {
  std::vector<std::vector<double>> blocks(views.size());
  for (size_t i = 0; i < views.size(); ++i) {
    blocks[i].resize((views[i].numel + kNormBlock - 1) / kNormBlock);
  }
  const std::vector<Chunk> chunks = chunks_of(views);
  const auto run = PYPRUNE_KERNEL(sum_squares);
  share_tasks(static_cast<int64_t>(chunks.size()), [&](int64_t task, int64_t) {
    const auto [tensor, start, count] = chunks[task];
    const Strided& view = views[tensor];
    std::vector<uint64_t> room;
    const char* data = view.in_a_row(start, count, room);
    for (int64_t i = 0; i < count; i += kNormBlock) {
      blocks[tensor][(start + i) / kNormBlock] =
          run(data + i * item_size(view.dtype), view.dtype, std::min(kNormBlock, count - i), factor);
    }
  });
  std::vector<double> sums;
  for (auto& one : blocks) {
    sums.push_back(reduce_blocks(std::move(one)));
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
