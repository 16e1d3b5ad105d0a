// fold: w[~mask] = 0 in place, chunk by chunk over the whole list.
#include "kernels/fold.h"

#include <torch/csrc/stable/library.h>

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
  share_tasks(static_cast<int64_t>(chunks.size()), [&](int64_t task, int64_t) {
    const auto [tensor, start, count] = chunks[task];
    const Strided &weight = w[tensor], &mask = m[tensor];
    if (weight.contiguous() && mask.contiguous()) {
      run(weight.at(start), reinterpret_cast<const uint8_t*>(mask.at(start)), weight.dtype, count);
      return;
    }
    std::vector<uint8_t> mask_run(count);
    std::vector<uint64_t> weight_run(count);  // room for the widest dtype
    mask.gather(start, count, mask_run.data());
    weight.gather(start, count, weight_run.data());
    run(weight_run.data(), mask_run.data(), weight.dtype, count);
    weight.scatter(start, count, weight_run.data());
  });
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("fold", TORCH_BOX(&pyprune::fold));
}
