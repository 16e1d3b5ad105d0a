// What sparsegpt_block takes, on the CPU and on CUDA.
#pragma once

#include "check.h"

namespace pyprune {

inline void check_sparsegpt_block(const torch::stable::Tensor& weight, const torch::stable::Tensor& sums,
                                  const torch::stable::Tensor& factor, const torch::stable::Tensor& mask,
                                  int64_t keep, int64_t of) {
  const Dtype dtype = dtype_of(weight);
  STD_TORCH_CHECK(dtype == Dtype::kFloat32 || dtype == Dtype::kFloat64, "weight must be float32 or float64");
  STD_TORCH_CHECK(dtype_of(sums) == dtype && dtype_of(factor) == dtype && dtype_of(mask) == Dtype::kBool,
                  "sums and factor must be of the weight's dtype, the mask bool");
  STD_TORCH_CHECK(weight.dim() == 2 && factor.dim() == 2, "weight and factor must be matrices");
  STD_TORCH_CHECK(sums.sizes().vec() == weight.sizes().vec() && mask.sizes().vec() == weight.sizes().vec() &&
                      factor.size(0) == weight.size(1) && factor.size(1) == weight.size(1),
                  "sums and mask must have the weight's shape, the factor a row and column for each of its columns");
  for (const auto* tensor : {&weight, &sums, &factor, &mask}) {
    STD_TORCH_CHECK(tensor->size(1) <= 1 || tensor->stride(1) == 1, "columns must lie one after the other");
  }
  STD_TORCH_CHECK(of == 0 || (2 <= of && of <= 64 && 1 <= keep && keep < of), "cannot keep ", keep, " of ", of);
}

}  // namespace pyprune
