// count_zeros: zeros per tensor, chunk by chunk over the whole list.
#include "kernels/count_zeros.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "capability.h"
#include "parallel.h"
#include "tensors.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

Tensor count_zeros(const std::vector<Tensor> tensors) {
  std::vector<Strided> views = strided_of(tensors);
  for (Strided& view : views) {
    as_flat({&view});
  }
  const std::vector<Chunk> chunks = chunks_of(views);
  std::vector<int64_t> counts(chunks.size());
  const auto run = PYPRUNE_KERNEL(count_zeros_run);
  share_tasks(static_cast<int64_t>(chunks.size()), elements_of(views), [&](int64_t task, int64_t) {
    const auto [tensor, start, count] = chunks[task];
    const Strided& view = views[tensor];
    Room room;
    counts[task] = run(view.in_a_row(start, count, room), view.dtype, count);
  });
  Tensor result = torch::stable::empty({static_cast<int64_t>(tensors.size())}, torch::headeronly::ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(result.mutable_data_ptr());
  std::fill(out, out + tensors.size(), 0);
  for (size_t i = 0; i < chunks.size(); ++i) {
    out[chunks[i].tensor] += counts[i];
  }
  return result;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("count_zeros", TORCH_BOX(&pyprune::count_zeros));
}
