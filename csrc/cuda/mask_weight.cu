#include "kernels/mask_weight.cuh"
#include "upload.cuh"

namespace pyprune {
namespace {

template <class Bits>
void write_masked(const Tensor& weight, const Tensor& mask, Tensor& out) {
  Loops<3> loops;
  for (int64_t d = 0; d < weight.dim(); ++d) {
    loops.add(weight.size(d), {weight.stride(d), mask.stride(d), out.stride(d)});
  }
  launch_mask_weight<Bits>(weight.numel(), loops.nest(Order::kAny), static_cast<const Bits*>(weight.const_data_ptr()),
                           static_cast<const uint8_t*>(mask.const_data_ptr()),
                           static_cast<Bits*>(out.mutable_data_ptr()), current_stream(weight));
}

Tensor mask_weight(const Tensor weight, const Tensor mask) {
  check_weights({weight});
  check_masks({mask}, {weight});
  // A pointer of another device would take the whole process's CUDA context down.
  STD_TORCH_CHECK(mask.is_cuda() && mask.get_device_index() == weight.get_device_index(),
                  "mask and weight must be on one CUDA device");
  Tensor out = torch::stable::empty_like(weight);
  if (weight.numel() == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  switch (item_size(dtype_of(weight))) {
    case 2: write_masked<uint16_t>(weight, mask, out); break;
    case 4: write_masked<uint32_t>(weight, mask, out); break;
    default: write_masked<uint64_t>(weight, mask, out);
  }
  return out;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("mask_weight", TORCH_BOX(&pyprune::mask_weight));
}
