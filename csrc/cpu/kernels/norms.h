// Sums of squares of the blocks of a run, in float64, in the order of norm_order.h. Reads each element once. The last
// block may be shorter.
#pragma once

#include <cstdint>

#include "../../dtype.h"
#include "../../norm_order.h"
#include "capability_namespace.h"

// `factor` multiplies each element first; only float64 is ever scaled (for the others it must be 1).
#define PYPRUNE_DECLARE_NORMS                                                               \
  void sum_squares(const void* x, Dtype dtype, int64_t count, double factor, double* sums); \
  double sum_block(const double* x, int64_t count);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_NORMS)
