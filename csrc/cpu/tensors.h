// From torch tensors to what the drivers work on.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../check.h"
#include "strided.h"
#include "unit_pattern.h"

namespace pyprune {

inline Strided strided_of(const torch::stable::Tensor& tensor) {
  check_on_cpu(tensor);
  return Strided(const_cast<void*>(tensor.const_data_ptr()), dtype_of(tensor), tensor.sizes().data(),
                 tensor.strides().data(), tensor.dim());
}

inline std::vector<Strided> strided_of(const std::vector<torch::stable::Tensor>& tensors) {
  std::vector<Strided> result;
  result.reserve(tensors.size());
  for (const auto& tensor : tensors) {
    result.push_back(strided_of(tensor));
  }
  return result;
}

inline std::vector<std::optional<Strided>> strided_of(
    const std::vector<std::optional<torch::stable::Tensor>>& tensors) {
  std::vector<std::optional<Strided>> result;
  for (const auto& tensor : tensors) {
    result.push_back(tensor.has_value() ? std::optional(strided_of(*tensor)) : std::nullopt);
  }
  return result;
}

// The masks of the units of tensors, which are then viewed as flat where they are dense; `blocks` has the sizes of
// the first tensor's units, then the second's.
inline std::vector<UnitPattern> patterns_of(const std::vector<torch::stable::Tensor>& tensors,
                                            std::vector<Strided>& views,
                                            const std::vector<torch::stable::Tensor>& unit_masks,
                                            const std::vector<int64_t>& blocks) {
  check_unit_masks(unit_masks, tensors, blocks);
  std::vector<UnitPattern> result;
  const int64_t* block = blocks.data();
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_on_cpu(unit_masks[i]);
    result.emplace_back(views[i], tensors[i].sizes().data(), tensors[i].strides().data(), block, tensors[i].dim(),
                        static_cast<const uint8_t*>(unit_masks[i].const_data_ptr()), unit_masks[i].strides().data());
    block += tensors[i].dim();
  }
  return result;
}

}  // namespace pyprune
