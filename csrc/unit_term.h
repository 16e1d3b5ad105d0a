// What is summed over a unit, on CPU and GPU.
#pragma once

#include <cstdint>

namespace pyprune {

enum class UnitPower : uint8_t { kSigned, kMagnitude, kSquare, kOther };

struct UnitTerm {
  UnitPower power = UnitPower::kSigned;  // x, |x|, x^2 or |x|^p
  bool maximum = false;                  // of the terms, instead of their sum: of x or |x|, raised to the power once
  double p = 1;

  // For what was summed already.
  constexpr UnitTerm of_sums() const { return {UnitPower::kSigned, maximum, 1}; }
};

}  // namespace pyprune
