// expand: masks of elements from masks of units, chunk by chunk over the whole list.
#include <torch/csrc/stable/library.h>

#include "parallel.h"
#include "tensors.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

void expand(const std::vector<Tensor> unit_masks, const std::vector<int64_t> blocks,
            const std::vector<Tensor> masks) {
  std::vector<Strided> m = strided_of(masks);
  const std::vector<UnitPattern> patterns = patterns_of(masks, m, unit_masks, blocks);
  const std::vector<Chunk> chunks = chunks_of(m);
  share_tasks(static_cast<int64_t>(chunks.size()), elements_of(m), [&](int64_t task, int64_t) {
    const auto [tensor, start, count] = chunks[task];
    Room room;
    char* row = m[tensor].to_write(start, count, room);
    patterns[tensor].write(start, count, reinterpret_cast<uint8_t*>(row));
    if (!m[tensor].contiguous()) {
      m[tensor].scatter(start, count, row);
    }
  });
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("expand", TORCH_BOX(&pyprune::expand));
}
