// Sweep of the threshold: split magnitudes by three bounds, writing provisional masks on the way.
//
//   mask[i] = |x[i]| > middle        candidates: low < |x[i]| <= high
//
// Magnitudes compare as their bits, signed, so that a bound of -1 lies below zero. One read of x and one write of
// mask per element (item size + 1 bytes). `count` is at most 65536.
#pragma once

#include <cstdint>

#include "capability_namespace.h"

namespace pyprune {

struct Sweep {
  int64_t above = 0;       // elements above low
  int64_t candidates = 0;  // elements above low and not above high
  uint64_t largest = 0;    // largest magnitude bits, to find what is not finite
};

}  // namespace pyprune

// With `bits` and `positions` (room for `count` + 1 each) candidates are also stored, in order; with null they are
// counted.
#define PYPRUNE_DECLARE_SWEEP                                                                               \
  Sweep sweep16(const uint16_t* x, uint8_t* mask, int64_t count, int64_t low, int64_t middle, int64_t high, \
                uint16_t* bits, uint16_t* positions);                                                       \
  Sweep sweep32(const uint32_t* x, uint8_t* mask, int64_t count, int64_t low, int64_t middle, int64_t high, \
                uint32_t* bits, uint16_t* positions);                                                       \
  Sweep sweep64(const uint64_t* x, uint8_t* mask, int64_t count, int64_t low, int64_t middle, int64_t high, \
                uint64_t* bits, uint16_t* positions);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_SWEEP)
