// The order in which sums of squares are added, and how float64 stays in range: the same on CPU and GPU, and in
// pyprune/ops/reference.py, because the masks depend on the last bit of a norm.
#pragma once

#include <cstdint>

namespace pyprune {

constexpr int64_t kNormBlock = 4096;  // elements that are summed into one number
constexpr int64_t kNormLanes = 16;    // lane j adds elements j, j + 16, ... of a block; lanes are added in halves

// Outside [kSmallestSum, infinity) the squares of float64 left its range, and the sum of scaled ones counts.
constexpr double kSmallestSum = 0x1p-900;
constexpr double kScaleDown = 0x1p-600;
constexpr double kScaleUp = 0x1p600;

}  // namespace pyprune
