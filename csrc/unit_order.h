// The order in which the elements of a unit are added: the same on CPU and GPU, and in pyprune/ops/reference.py,
// because masks depend on the last bit of a score. Dimension by dimension, the first one first. Along a dimension,
// lane j adds elements j, j + lanes, ..., at most 256 of them, and the lanes are added in halves; what has more
// elements is cut into pieces, whose sums are added in the same way.
#pragma once

#include <cstdint>

#include "norm_order.h"

namespace pyprune {

constexpr int64_t kUnitSteps = 256;
constexpr int64_t kUnitLanes = kNormLanes;
constexpr int64_t kUnitRoom = 64;  // so many elements of later dimensions fill the lanes of a processor, too

// How many lanes share `count` elements along a dimension, each with `behind` elements of later dimensions.
constexpr int64_t unit_lanes(int64_t count, int64_t behind) {
  return count <= kUnitLanes || behind >= kUnitRoom ? 1 : kUnitLanes;
}
constexpr int64_t unit_pieces(int64_t count, int64_t behind) {
  const int64_t size = kUnitSteps * unit_lanes(count, behind);
  return (count + size - 1) / size;
}

}  // namespace pyprune
