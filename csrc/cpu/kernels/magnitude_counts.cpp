#include "magnitude_counts.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

template <class T>
int64_t count_bits(const T* x, int64_t count, Intervals intervals, uint32_t* even) {
  uint32_t* odd = even + intervals.bins;
  const T low = static_cast<T>(intervals.low), bins = static_cast<T>(intervals.bins);
  const int shift = intervals.shift;
  int64_t below = 0;
  const auto add = [&](T element, uint32_t* table) {
    const T bits = element & kMagnitude<T>;
    // What is below wraps around, to a place behind the last.
    const T place = static_cast<T>(static_cast<T>(bits - low) >> shift);
    below += bits < low;
    if (place < bins) {
      ++table[place];
    }
  };
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    add(x[i], even);
    add(x[i + 1], odd);
  }
  if (i < count) {
    add(x[i], even);
  }
  return below;
}

}  // namespace

int64_t magnitude_counts_run(const void* x, Dtype dtype, int64_t count, Intervals intervals, uint32_t* tables) {
  switch (item_size(dtype)) {
    case 2: return count_bits(static_cast<const uint16_t*>(x), count, intervals, tables);
    case 4: return count_bits(static_cast<const uint32_t*>(x), count, intervals, tables);
    default: return count_bits(static_cast<const uint64_t*>(x), count, intervals, tables);
  }
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
