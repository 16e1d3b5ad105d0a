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

// What is elsewhere has a pointer all the same, or none.
inline void check_on_cpu(const torch::stable::Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), "all tensors must be on the CPU");
}

inline void check_seed(const torch::stable::Tensor& seed) {
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == torch::headeronly::ScalarType::Long,
                  "seed must be one int64");
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

// One mask per unit; `blocks` has the sizes of the first tensor's units, then the second's.
inline void check_unit_masks(const std::vector<torch::stable::Tensor>& unit_masks,
                             const std::vector<torch::stable::Tensor>& tensors, const std::vector<int64_t>& blocks) {
  STD_TORCH_CHECK(unit_masks.size() == tensors.size(), "expected one mask of units per tensor");
  size_t at = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    STD_TORCH_CHECK(dtype_of(unit_masks[i]) == Dtype::kBool, "masks must be bool");
    bool fit = unit_masks[i].dim() == tensors[i].dim() && at + tensors[i].dim() <= blocks.size();
    for (int64_t d = 0; fit && d < tensors[i].dim(); ++d, ++at) {
      fit = blocks[at] > 0 && unit_masks[i].size(d) == (tensors[i].size(d) + blocks[at] - 1) / blocks[at];
    }
    STD_TORCH_CHECK(fit, "mask of units and blocks differ in shape");
  }
}

}  // namespace pyprune
