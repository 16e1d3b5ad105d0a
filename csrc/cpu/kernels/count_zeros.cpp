#include "count_zeros.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

// Counting in the elements' own width keeps the loop at full vector speed; a lane that counts bytes overflows
// after 255 steps, so the sums are emptied in time.
template <class T>
int64_t count_bits(const T* x, int64_t count, T magnitude) {
  constexpr int64_t kLanes = 64 / sizeof(T) * 2;
  constexpr int64_t kSteps = 240;
  int64_t total = 0, i = 0;
  while (i + kLanes <= count) {
    T lanes[kLanes] = {};
    for (int64_t step = 0; step < kSteps && i + kLanes <= count; ++step, i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) {
        lanes[j] = static_cast<T>(lanes[j] + ((x[i + j] & magnitude) == 0));
      }
    }
    for (T lane : lanes) {
      total += static_cast<int64_t>(lane);
    }
  }
  for (; i < count; ++i) {
    total += (x[i] & magnitude) == 0;
  }
  return total;
}

}  // namespace

int64_t count_zeros_run(const void* x, Dtype dtype, int64_t count) {
  switch (item_size(dtype)) {
    case 1: return count_bits<uint8_t>(static_cast<const uint8_t*>(x), count, 0xff);
    case 2: return count_bits<uint16_t>(static_cast<const uint16_t*>(x), count, 0x7fff);
    case 4: return count_bits<uint32_t>(static_cast<const uint32_t*>(x), count, 0x7fffffff);
    default: return count_bits<uint64_t>(static_cast<const uint64_t*>(x), count, 0x7fffffffffffffff);
  }
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
