#include "unit_layouts.cuh"

namespace pyprune {
namespace {

void expand(const std::vector<Tensor>& unit_masks, const std::vector<int64_t>& blocks,
            const std::vector<Tensor>& masks) {
  for (const Tensor& mask : masks) STD_TORCH_CHECK(dtype_of(mask) == Dtype::kBool, "masks must be bool");
  write_unit_pattern<false>(masks, unit_masks, blocks);
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("expand", TORCH_BOX(&pyprune::expand));
}
