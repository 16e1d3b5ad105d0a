#include "kernels/norms.cuh"
#include "upload.cuh"

namespace pyprune {
namespace {

Tensor norms(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "norms needs at least one tensor");
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  const cudaStream_t stream = current_stream(tensors[0]);
  const int64_t count = static_cast<int64_t>(tensors.size());
  Tensor result = new_vector(tensors[0], count, ScalarType::Double);

  const UploadedTable uploaded(tensors, nullptr, Order::kLogical, Writes::kNothing, stream);
  const TensorTable& table = uploaded.table;
  const bool any_double = std::any_of(uploaded.host_rows.begin(), uploaded.host_rows.end(),
                                      [](const TableRow& row) { return row.dtype == Dtype::kFloat64; });
  const NormsRoom room(table, any_double);
  const DeviceArray<double> sums(tensors[0], room.sums), scratch(tensors[0], room.scratch);
  launch_norms(table, room, sums.data, scratch.data, static_cast<double*>(result.mutable_data_ptr()), stream);
  return result;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("norms", TORCH_BOX(&pyprune::norms));
}
