// Whether a dropped element (mask[i] is 0) is not +0. Reads weight and mask once (item size + 1 bytes).
#pragma once

#include <cstdint>

#include "../../dtype.h"
#include "capability_namespace.h"

#define PYPRUNE_DECLARE_PROBE bool has_stray(const void* weight, const uint8_t* mask, Dtype dtype, int64_t count);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_PROBE)
