#include "kernels/gate_penalty.cuh"
#include "upload.cuh"

namespace pyprune {
namespace {

Tensor gate_penalty(const std::vector<Tensor> logits, bool hard, double shift) {
  STD_TORCH_CHECK(!logits.empty(), "gate_penalty needs at least one tensor");
  check_weights(logits);
  const int32_t device = logits[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(logits[0]);
  const int64_t count = static_cast<int64_t>(logits.size());
  Tensor penalties = new_vector(logits[0], count, ScalarType::Double);

  const UploadedTable uploaded(logits, nullptr, Order::kLogical, Writes::kNothing, stream);
  const TensorTable& table = uploaded.table;
  const DeviceArray<double> sums(logits[0], table.tiles);
  launch_gate_penalty(table, uploaded.host_rows, hard, shift, sums.data,
                      static_cast<double*>(penalties.mutable_data_ptr()), stream);
  return penalties;
}

std::vector<Tensor> gate_penalty_backward(const Tensor grad, const std::vector<Tensor> logits, double shift) {
  check_weights(logits);
  std::vector<Tensor> gradients;
  if (logits.empty()) return gradients;
  const int32_t device = logits[0].get_device_index();
  STD_TORCH_CHECK(grad.is_cuda() && grad.get_device_index() == device && grad.scalar_type() == ScalarType::Double &&
                      grad.dim() == 1 && grad.numel() == static_cast<int64_t>(logits.size()),
                  "gate_penalty_backward needs one float64 gradient per tensor, on their device");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(logits[0]);
  for (const Tensor& one : logits) gradients.push_back(torch::stable::empty_like(one));

  const UploadedTable uploaded(logits, &gradients, Order::kAny, Writes::kPartners, stream);
  launch_gate_penalty_backward(uploaded.table, uploaded.host_rows, static_cast<const double*>(grad.const_data_ptr()),
                               grad.stride(0), shift, stream);
  return gradients;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("gate_penalty", TORCH_BOX(&pyprune::gate_penalty));
  m.impl("gate_penalty_backward", TORCH_BOX(&pyprune::gate_penalty_backward));
}
