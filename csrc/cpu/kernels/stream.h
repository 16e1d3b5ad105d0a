// Copies a row of results past the caches. Meant for rows that lie in the first-level cache and targets that do not.
#pragma once

#include <cstdint>

#include "capability_namespace.h"

#define PYPRUNE_DECLARE_STREAM void stream_row(void* to, const void* from, int64_t bytes);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_STREAM)
