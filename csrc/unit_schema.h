// What the arguments of unit_scores mean, and where its results go: for CPU and CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "check.h"
#include "unit_term.h"

namespace pyprune {

enum UnitReduction : int64_t { kSum, kMean, kMax };

inline UnitTerm unit_term(std::optional<double> p, int64_t reduction) {
  const UnitPower power = !p        ? UnitPower::kSigned
                          : *p == 1 ? UnitPower::kMagnitude
                          : *p == 2 ? UnitPower::kSquare
                                    : UnitPower::kOther;
  return {power, reduction == kMax, p.value_or(1)};
}

// Counts of bool must be exact.
inline bool scores_are_wide(Dtype dtype) {
  return dtype == Dtype::kFloat64 || dtype == Dtype::kBool;
}

inline torch::stable::Tensor new_scores(const torch::stable::Tensor& tensor, const int64_t* block) {
  using torch::headeronly::ScalarType;
  std::vector<int64_t> units;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    STD_TORCH_CHECK(block[d] > 0, "blocks have at least one element");
    units.push_back((tensor.size(d) + block[d] - 1) / block[d]);
  }
  return torch::stable::new_empty(tensor, units,
                                  scores_are_wide(dtype_of(tensor)) ? ScalarType::Double : ScalarType::Float);
}

}  // namespace pyprune
