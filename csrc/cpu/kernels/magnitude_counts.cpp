#include "magnitude_counts.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

template <class T>
void count_bits(const T* x, int64_t count, Intervals intervals, uint32_t* even) {
  uint32_t* odd = even + intervals.bins;
  const T low = static_cast<T>(intervals.low), bins = static_cast<T>(intervals.bins);
  const int shift = intervals.shift;
  // What is below `low` wraps around, to a place behind the last.
  const auto place = [&](int64_t i) {
    return static_cast<T>(static_cast<T>((x[i] & kMagnitude<T>)-low) >> shift);
  };
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    const T first = place(i), second = place(i + 1);
    if (first < bins) {
      ++even[first];
    }
    if (second < bins) {
      ++odd[second];
    }
  }
  if (i < count && place(i) < bins) {
    ++even[place(i)];
  }
}

}  // namespace

void magnitude_counts_run(const void* x, Dtype dtype, int64_t count, Intervals intervals, uint32_t* tables) {
  switch (item_size(dtype)) {
    case 2: return count_bits(static_cast<const uint16_t*>(x), count, intervals, tables);
    case 4: return count_bits(static_cast<const uint32_t*>(x), count, intervals, tables);
    default: return count_bits(static_cast<const uint64_t*>(x), count, intervals, tables);
  }
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
