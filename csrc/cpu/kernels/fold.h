// out[i] = mask[i] ? w[i] : +0, on the bits; out may be w itself. Reads and writes each weight, reads each mask byte
// (2 * item size + 1 bytes).
#pragma once

#include <cstdint>

#include "../../dtype.h"
#include "capability_namespace.h"

// clear_run: the same in place, but writes only where something is not zero yet, two cache lines at a time: where the
// zeros are there, as after most steps of a training, it only reads (item size + 1 bytes).
#define PYPRUNE_DECLARE_FOLD                                                                     \
  void fold_run(const void* weight, const uint8_t* mask, void* out, Dtype dtype, int64_t count); \
  void clear_run(void* weight, const uint8_t* mask, Dtype dtype, int64_t count);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_FOLD)
