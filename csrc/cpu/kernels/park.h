// What a mask drops, moved out of a weight into a row of its own, and back.
//
// park_run: appends w[i] to `parked` where mask[i] is 0, and sets w[i] = +0 there. unpark_run: the reverse. `dropped`
// is how many that are; nothing is written or read behind them. Reads mask and weight once, writes the weight and
// what is dropped (2 * item size + 1 bytes per element, and one item size per dropped one).
#pragma once

#include <cstdint>

#include "../../dtype.h"
#include "capability_namespace.h"

#define PYPRUNE_DECLARE_PARK                                                                                   \
  void park_run(void* weight, const uint8_t* mask, void* parked, Dtype dtype, int64_t count, int64_t dropped); \
  void unpark_run(void* weight, const uint8_t* mask, const void* parked, Dtype dtype, int64_t count, int64_t dropped);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_PARK)
