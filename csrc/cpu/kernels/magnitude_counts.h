// How many elements have magnitude bits in each of many equal intervals: table[(bits - low) >> shift] for those that
// fall into it. Returns how many are below `low`. Reads each element once; neighbours go to two tables, because a
// counter that was just written takes long to be read again.
#pragma once

#include <cstdint>

#include "../../dtype.h"
#include "capability_namespace.h"

namespace pyprune {

// bins << shift is at most the number of magnitudes of the dtype.
struct Intervals {
  uint64_t low;
  int shift;
  uint64_t bins;
};

}  // namespace pyprune

// `tables` are two of intervals.bins counters, which must not overflow: at most 2^32 - 1 elements in all.
#define PYPRUNE_DECLARE_MAGNITUDE_COUNTS \
  int64_t magnitude_counts_run(const void* x, Dtype dtype, int64_t count, Intervals intervals, uint32_t* tables);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_MAGNITUDE_COUNTS)
