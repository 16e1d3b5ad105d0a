// Sum of squares of one block of at most 4096 elements, in float64: 16 lanes (lane j adds elements j, j+16, ...),
// added in halves. Reads each element once. The order of additions is the contract: it makes the result the same bits
// for every capability, thread count and device.
#pragma once

#include <cstdint>

#include "../../dtype.h"
#include "capability_namespace.h"

namespace pyprune {

constexpr int64_t kNormBlock = 4096;
constexpr int64_t kNormLanes = 16;

}  // namespace pyprune

// `factor` multiplies each element first; only float64 is ever scaled (for the others it must be 1).
#define PYPRUNE_DECLARE_NORMS                                                   \
  double sum_squares(const void* x, Dtype dtype, int64_t count, double factor); \
  double sum_block(const double* x, int64_t count);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_NORMS)
