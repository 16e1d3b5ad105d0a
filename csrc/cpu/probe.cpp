// probe: looks at a few elements of each weight that its mask drops. Cheaper than reading all of it by far (a cache
// miss or two per look), and enough to see that something wrote to the weight as a whole.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "tensors.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

constexpr int64_t kLooks = 128;

bool is_zero(const char* element, int64_t size) {
  uint64_t bits = 0;
  std::memcpy(&bits, element, size);
  return bits == 0;
}

// The number of dropped elements that are not zero, among those looked at; all are, where there are few, or if the
// turn is negative. -1 where the
// weight and its mask do not lie in memory alike.
Tensor probe(const std::vector<Tensor> weights, const std::vector<Tensor> masks, int64_t turn) {
  check_weights(weights);
  check_masks(masks, weights);
  Tensor result = torch::stable::empty({static_cast<int64_t>(weights.size())}, torch::headeronly::ScalarType::Long);
  int64_t* const strays = static_cast<int64_t*>(result.mutable_data_ptr());
  for (size_t i = 0; i < weights.size(); ++i) {
    Strided weight = strided_of(weights[i]), mask = strided_of(masks[i]);
    if (!as_flat({&weight, &mask})) {
      strays[i] = -1;
      continue;
    }
    strays[i] = 0;
    const int64_t size = item_size(weight.dtype), step = turn < 0 ? 1 : std::max<int64_t>(1, weight.numel / kLooks);
    // Others at each turn, so that all are seen in the end.
    for (int64_t at = step == 1 ? 0 : turn * 7919 % step; at < weight.numel; at += step) {
      strays[i] += mask.data[at] == 0 && !is_zero(weight.data + at * size, size);
    }
  }
  return result;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("probe", TORCH_BOX(&pyprune::probe));
}
