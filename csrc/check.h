// The dtypes that kernels know, and the invariants that CPU and CUDA share. Users' mistakes are caught in Python.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "dtype.h"

namespace pyprune {

inline Dtype dtype_of(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Bool: return Dtype::kBool;
    default: STD_TORCH_CHECK(false, "pyprune kernels take float32, float64, float16, bfloat16 and bool");
  }
}

inline void check_weights(const std::vector<torch::stable::Tensor>& weights) {
  for (const auto& weight : weights) {
    STD_TORCH_CHECK(dtype_of(weight) != Dtype::kBool, "weights must be floating point");
  }
}

// Masks and weights are matched by position.
inline void check_masks(const std::vector<torch::stable::Tensor>& masks,
                        const std::vector<torch::stable::Tensor>& weights) {
  STD_TORCH_CHECK(weights.size() == masks.size(), "expected one mask per weight");
  for (size_t i = 0; i < weights.size(); ++i) {
    STD_TORCH_CHECK(dtype_of(masks[i]) == Dtype::kBool, "masks must be bool");
    STD_TORCH_CHECK(weights[i].sizes().vec() == masks[i].sizes().vec(), "mask and weight differ in shape");
  }
}

// No bases, or for each weight one or none.
inline void check_bases(const std::vector<std::optional<torch::stable::Tensor>>& bases,
                        const std::vector<torch::stable::Tensor>& weights) {
  STD_TORCH_CHECK(bases.empty() || bases.size() == weights.size(), "expected a base or none per weight");
  for (size_t i = 0; i < bases.size(); ++i) {
    if (bases[i].has_value()) {
      STD_TORCH_CHECK(dtype_of(*bases[i]) == Dtype::kBool, "bases must be bool");
      STD_TORCH_CHECK(weights[i].sizes().vec() == bases[i]->sizes().vec(), "base and weight differ in shape");
    }
  }
}

}  // namespace pyprune
