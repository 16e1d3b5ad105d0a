// fold: w[~mask] = 0 in place, chunk by chunk over the whole list; with a mask for each element or for each unit.
#include "kernels/fold.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "capability.h"
#include "parallel.h"
#include "tensors.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

void fold(const std::vector<Tensor> weights, const std::vector<Tensor> masks) {
  check_weights(weights);
  check_masks(masks, weights);
  std::vector<Strided> w = strided_of(weights), m = strided_of(masks);
  for (size_t i = 0; i < w.size(); ++i) {
    as_flat({&w[i], &m[i]});
  }
  const std::vector<Chunk> chunks = chunks_of(w);
  const auto run = PYPRUNE_KERNEL(fold_run);
  share_tasks(static_cast<int64_t>(chunks.size()), elements_of(w), [&](int64_t task, int64_t) {
    const auto [tensor, start, count] = chunks[task];
    const Strided &weight = w[tensor], &mask = m[tensor];
    Room weight_room, mask_room;
    char* row = weight.in_a_row(start, count, weight_room);
    run(row, reinterpret_cast<const uint8_t*>(mask.in_a_row(start, count, mask_room)), row, weight.dtype, count);
    if (!weight.contiguous()) {
      weight.scatter(start, count, row);
    }
  });
}

void fold_units(const std::vector<Tensor> weights, const std::vector<Tensor> unit_masks,
                const std::vector<int64_t> blocks) {
  check_weights(weights);
  std::vector<Strided> w = strided_of(weights);
  const std::vector<UnitPattern> patterns = patterns_of(weights, w, unit_masks, blocks);
  const std::vector<Chunk> chunks = chunks_of(w);
  const auto run = PYPRUNE_KERNEL(fold_run);
  share_tasks(static_cast<int64_t>(chunks.size()), elements_of(w), [&](int64_t task, int64_t) {
    const auto [tensor, start, count] = chunks[task];
    const Strided& weight = w[tensor];
    const UnitPattern& pattern = patterns[tensor];
    if (weight.contiguous() && pattern.has_long_runs()) {
      // What is kept is not even read.
      const int64_t size = item_size(weight.dtype);
      pattern.for_each_dropped_run(start, count, [&](int64_t first, int64_t dropped) {
        std::memset(weight.data + first * size, 0, dropped * size);
      });
      return;
    }
    Room weight_room;
    uint8_t mask[kChunk];
    pattern.write(start, count, mask);
    char* row = weight.in_a_row(start, count, weight_room);
    run(row, mask, row, weight.dtype, count);
    if (!weight.contiguous()) {
      weight.scatter(start, count, row);
    }
  });
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("fold", TORCH_BOX(&pyprune::fold));
  m.impl("fold_units", TORCH_BOX(&pyprune::fold_units));
}
