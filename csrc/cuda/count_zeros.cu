#include "kernels/count_zeros.cuh"
#include "upload.cuh"

namespace pyprune {
namespace {

Tensor count_zeros(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "count_zeros needs at least one tensor");
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  const cudaStream_t stream = current_stream(tensors[0]);
  const int64_t count = static_cast<int64_t>(tensors.size());
  Tensor zeros = new_vector(tensors[0], count, ScalarType::Long);
  int64_t* const data = static_cast<int64_t*>(zeros.mutable_data_ptr());
  fill_zero(data, count, stream);

  const UploadedTable uploaded(tensors, nullptr, Order::kAny, Writes::kNothing, stream);
  launch_count_zeros(uploaded.table, data, stream);
  return zeros;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("count_zeros", TORCH_BOX(&pyprune::count_zeros));
}
