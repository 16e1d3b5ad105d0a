#include "kernels/gate_noise.cuh"
#include "upload.cuh"

namespace pyprune {
namespace {

Tensor gate_noise(const Tensor seed, const std::vector<int64_t> size, int64_t stream) {
  check_seed(seed);
  const torch::stable::accelerator::DeviceGuard guard(seed.get_device_index());
  Tensor noise = torch::stable::new_empty(seed, size, ScalarType::Float);
  launch_gate_noise(static_cast<const int64_t*>(seed.const_data_ptr()), static_cast<uint64_t>(stream), noise.numel(),
                    static_cast<float*>(noise.mutable_data_ptr()), current_stream(seed));
  return noise;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("gate_noise", TORCH_BOX(&pyprune::gate_noise));
}
