#include "kernels/fold.cuh"
#include "unit_layouts.cuh"

namespace pyprune {
namespace {

void fold(const std::vector<Tensor>& weights, const std::vector<Tensor>& masks) {
  check_masks(masks, weights);
  if (weights.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(weights[0].get_device_index());
  const cudaStream_t stream = current_stream(weights[0]);
  const UploadedTable uploaded(weights, &masks, Order::kAny, Writes::kTensors, stream);
  launch_fold(uploaded.table, stream);
}

void fold_units(const std::vector<Tensor>& weights, const std::vector<Tensor>& unit_masks,
                const std::vector<int64_t>& blocks) {
  check_weights(weights);
  write_unit_pattern<true>(weights, unit_masks, blocks);
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("fold", TORCH_BOX(&pyprune::fold));
  m.impl("fold_units", TORCH_BOX(&pyprune::fold_units));
}
