// From torch tensors to what the drivers work on.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../check.h"
#include "strided.h"

namespace pyprune {

inline Strided strided_of(const torch::stable::Tensor& tensor) {
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

}  // namespace pyprune
