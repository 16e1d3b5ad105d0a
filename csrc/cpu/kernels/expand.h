// out[i * block + j] = units[i * stride] for j < block: a row of masks of units as a row of elements. Writes each
// byte once.
#pragma once

#include <cstdint>

#include "capability_namespace.h"

#define PYPRUNE_DECLARE_EXPAND                                                                         \
  void repeat_units(const uint8_t* units, int64_t stride, int64_t count, int64_t block, uint8_t* out); \
  void repeat_rows(const uint8_t* units, int64_t stride, int64_t count, int64_t row, int64_t times, uint8_t* out);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_EXPAND)
