// threshold: what torch hands over, as the kernels want it.
#include "kernels/threshold.cuh"
#include "upload.cuh"

namespace pyprune {
namespace {

Tensor threshold(const std::vector<Tensor>& weights, const std::optional<Tensor>& scales,
                 const std::vector<int64_t>& removed, const std::vector<Tensor>& masks,
                 const std::vector<std::optional<Tensor>>& bases) {
  const int64_t count = static_cast<int64_t>(weights.size());
  const int64_t groups = static_cast<int64_t>(removed.size());
  STD_TORCH_CHECK(count > 0, "threshold needs at least one weight");
  check_masks(masks, weights);
  check_bases(bases, weights);
  STD_TORCH_CHECK(groups == 1 || groups == count, "threshold needs one count, or one per weight");
  const int32_t device = weights[0].get_device_index();
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += weights[i].numel();
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t limit = groups == count ? weights[group].numel() : total;
    STD_TORCH_CHECK(0 <= removed[group] && removed[group] <= limit, "cannot remove ", removed[group], " of ", limit);
  }
  STD_TORCH_CHECK(!scales.has_value() ||
                      (scales->is_cuda() && scales->get_device_index() == device &&
                       scales->scalar_type() == ScalarType::Double && scales->dim() == 1 && scales->numel() == count),
                  "threshold needs one float64 scale per weight, on the weights' device");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(weights[0]);

  const UploadedTable uploaded(weights, &masks, Order::kLogical, Writes::kPartners, stream, bases);
  Tensor nonfinite = new_vector(weights[0], count, ScalarType::Long);
  int64_t* const counts = static_cast<int64_t*>(nonfinite.mutable_data_ptr());
  fill_zero(counts, count, stream);
  const ThresholdPlan plan(uploaded.host_rows, removed, scales.has_value());
  const DeviceArray<char> room(weights[0], ThresholdMemory(plan, uploaded.table).bytes);
  const ThresholdMemory memory(plan, uploaded.table, room.data);
  launch_threshold(uploaded.table, plan, memory, removed,
                   scales.has_value() ? static_cast<const double*>(scales->const_data_ptr()) : nullptr,
                   scales.has_value() ? scales->stride(0) : 0, counts, stream);
  return nonfinite;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("threshold", TORCH_BOX(&pyprune::threshold));
}
