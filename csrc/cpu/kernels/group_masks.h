// Masks that keep the `kept` largest scores of each group of `size` neighbours in a row; of equal ones the last.
//
// Score: |w|, or float32(|w|) * factor of the column (float64 for float64). Scores compare as signed integers, the
// bits of |w| or of the product; what a base drops is -1. Small groups are ranked: an element stays if fewer than
// `kept` others of its group beat it. Of long ones the smallest key that stays is searched while they are in cache.
// One read of the weight (and base) and one write of the mask per element.
#pragma once

#include <cstdint>

#include "../../dtype.h"
#include "capability_namespace.h"

namespace pyprune {

constexpr int64_t kRankedSize = 64;     // groups up to here are ranked
constexpr int64_t kGroupPiece = 4096;   // elements that are worked on in the first-level cache
constexpr int64_t kRowInCache = 65536;  // keys of rows up to here are computed once

// From one element to the next in a row, and from one row to the next.
struct Steps {
  int64_t row, column;
};

// Some rows of a weight, from the beginning of a group on. Groups of more than kRankedSize need columns one after the
// other, in all tensors.
struct GroupTile {
  Dtype dtype;
  const void* weight;
  const uint8_t* base;  // null: all may stay
  uint8_t* mask;
  Steps weight_steps, base_steps, mask_steps;
  const void* factors;  // of the columns, one after the other, finite and not negative: float, double for float64
  int64_t rows, columns;
  int64_t size, kept;
};

// What a thread needs to itself.
struct GroupRoom {
  alignas(64) uint64_t weights[kGroupPiece];
  alignas(64) uint64_t keys[kGroupPiece];
  alignas(64) uint64_t factors[kGroupPiece];
  alignas(64) float widened[kGroupPiece];
  alignas(64) uint8_t base[kGroupPiece];
  alignas(64) uint8_t mask[kGroupPiece];
  uint64_t* row_keys;  // kRowInCache of them, if groups are longer than kRankedSize and have factors or a base
};

}  // namespace pyprune

// Returns the number of elements that are not finite.
#define PYPRUNE_DECLARE_GROUP_MASKS int64_t mask_groups(const GroupTile& tile, GroupRoom& room);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_GROUP_MASKS)
