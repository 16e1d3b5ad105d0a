// out[i] = mask[i] ? w[i] : +0, on the bits; out may be w itself. Reads and writes each weight, reads each mask byte
// (2 * item size + 1 bytes).
#pragma once

#include <cstdint>

#include "../../dtype.h"
#include "capability_namespace.h"

#define PYPRUNE_DECLARE_FOLD \
  void fold_run(const void* weight, const uint8_t* mask, void* out, Dtype dtype, int64_t count);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_FOLD)
