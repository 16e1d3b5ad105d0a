#include "../sparsegpt_check.h"
#include "kernels/sparsegpt_block.cuh"
#include "upload.cuh"

namespace pyprune {
namespace {

template <typename Real>
void solve(const Tensor& weight, const Tensor& sums, const Tensor& factor, const Tensor& mask, int64_t keep,
           int64_t of) {
  launch_sparsegpt_block<Real>(
      {static_cast<Real*>(weight.mutable_data_ptr()), static_cast<Real*>(sums.mutable_data_ptr()),
       static_cast<const Real*>(factor.const_data_ptr()), static_cast<uint8_t*>(mask.mutable_data_ptr()),
       weight.stride(0), sums.stride(0), factor.stride(0), mask.stride(0), weight.size(0), weight.size(1), keep, of},
      current_stream(weight));
}

void sparsegpt_block(const Tensor weight, const Tensor sums, const Tensor factor, const Tensor mask, int64_t keep,
                     int64_t of) {
  check_sparsegpt_block(weight, sums, factor, mask, keep, of);
  for (const Tensor* tensor : {&sums, &factor, &mask}) {
    // A pointer of another device would take the whole process's CUDA context down.
    STD_TORCH_CHECK(tensor->is_cuda() && tensor->get_device_index() == weight.get_device_index(),
                    "all tensors must be on one CUDA device");
  }
  if (weight.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  if (dtype_of(weight) == Dtype::kFloat64) {
    solve<double>(weight, sums, factor, mask, keep, of);
  } else {
    solve<float>(weight, sums, factor, mask, keep, of);
  }
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("sparsegpt_block", TORCH_BOX(&pyprune::sparsegpt_block));
}
