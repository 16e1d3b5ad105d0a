// Sweep of the threshold: split magnitudes by three bounds, writing provisional masks on the way.
//
//   mask[i] = |x[i]| > middle        candidates: low < |x[i]| <= high
//
// Magnitudes compare as their bits, signed, so that a bound of -1 lies below zero. Where the byte of a base is zero,
// the element lies below all bounds. One read of x and of the base, if it is not null, and one write of mask per
// element (item size + 1 or + 2 bytes). `count` is at most 65536.
#pragma once

#include <cstdint>

#include "../../dtype.h"
#include "capability_namespace.h"

namespace pyprune {

// On magnitude bits: candidates lie above `low` and not above `high`; what is above `middle` is kept.
struct Bounds {
  int64_t low, middle, high;
};

struct Sweep {
  int64_t above = 0;       // elements above low
  int64_t candidates = 0;  // elements above low and not above high
  uint64_t largest = 0;    // largest magnitude bits, to find what is not finite
};

// What else a sweep does on its way.
struct Errands {
  double* squares = nullptr;      // where the sums of squares of the blocks of kernels/norms.h go,
  Dtype dtype = Dtype::kFloat32;  // of elements of this type
  const void* fetch = nullptr;    // as much memory as is swept, to be fetched for later
};

}  // namespace pyprune

// With `bits` and `positions` (room for `count` + 1 each) candidates are also stored, in order; with null they are
// counted.
#define PYPRUNE_DECLARE_SWEEP                                                                               \
  Sweep sweep16(const uint16_t* x, const uint8_t* base, uint8_t* mask, int64_t count, const Bounds& bounds, \
                uint16_t* bits, uint16_t* positions, const Errands& errands);                               \
  Sweep sweep32(const uint32_t* x, const uint8_t* base, uint8_t* mask, int64_t count, const Bounds& bounds, \
                uint32_t* bits, uint16_t* positions, const Errands& errands);                               \
  Sweep sweep64(const uint64_t* x, const uint8_t* base, uint8_t* mask, int64_t count, const Bounds& bounds, \
                uint64_t* bits, uint16_t* positions, const Errands& errands);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_SWEEP)
