// Sums over logits and their gradients: reads each logit once; the gradient is written once (8 bytes in float32).
// The sum is taken in float64, in an order that the number of elements alone decides.
#pragma once

#include <cstdint>

#include "../../dtype.h"
#include "../../gate_math.h"
#include "capability_namespace.h"

#define PYPRUNE_DECLARE_GATE_PENALTY                                                           \
  double penalty_sum(Dtype dtype, const void* logits, bool hard, double shift, int64_t count); \
  void penalty_slopes(Dtype dtype, const void* logits, double shift, double grad, int64_t count, void* out);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_GATE_PENALTY)
