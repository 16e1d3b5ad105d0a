// Number of elements equal to zero, +0 or -0 (for bool: False). Reads each element once.
#pragma once

#include <cstdint>

#include "../../dtype.h"
#include "capability_namespace.h"

#define PYPRUNE_DECLARE_COUNT int64_t count_zeros_run(const void* x, Dtype dtype, int64_t count);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_COUNT)
