#include "threshold.h"

#include "../../dtype.h"
#include "sweep_block.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

// What is left when whole blocks are done, and everything where there are no blocks. Sums in the elements' own width,
// so that the compiler can vectorise the loop over 64 of them.
template <class T, bool kStore>
void sweep_plain(const T* x, uint8_t* mask, int64_t begin, int64_t end, int64_t low, int64_t middle, int64_t high,
                 T* bits, uint16_t* positions, Sweep& result) {
  // Bounds moved up by one, so that the comparison needs no sign: they may be -1.
  const T lo = static_cast<T>(low) + T{1}, mid = static_cast<T>(middle) + T{1}, hi = static_cast<T>(high) + T{1};
  T largest = 0;
  for (int64_t start = begin; start < end; start += 64) {
    const int64_t stop = start + 64 < end ? start + 64 : end;
    T above_low = 0, inside = 0;
    for (int64_t i = start; i < stop; ++i) {
      const T magnitude = x[i] & kMagnitude<T>;
      const T above = magnitude + T{1} > lo;
      mask[i] = static_cast<uint8_t>(magnitude + T{1} > mid);
      above_low += above;
      inside += above & static_cast<T>(magnitude + T{1} <= hi);
      largest = magnitude > largest ? magnitude : largest;
    }
    if (kStore && inside != 0) {
      for (int64_t i = start; i < stop; ++i) {
        const int64_t magnitude = static_cast<int64_t>(x[i] & kMagnitude<T>);
        if (magnitude > low && magnitude <= high) {
          bits[result.candidates] = static_cast<T>(magnitude);
          positions[result.candidates++] = static_cast<uint16_t>(i);
        }
      }
    } else {
      result.candidates += static_cast<int64_t>(inside);
    }
    result.above += static_cast<int64_t>(above_low);
  }
  result.largest = largest > result.largest ? largest : result.largest;
}

template <class T, bool kStore>
Sweep sweep_as(const T* x, uint8_t* mask, int64_t count, int64_t low, int64_t middle, int64_t high, T* bits,
               uint16_t* positions) {
  Sweep result;
  int64_t done = 0;
#if defined(__SSE2__)
  if constexpr (kHasBlock<T>) {
    Block<T> block(low, middle, high);
    // A mask is read again long after it has left the cache: streaming saves reading its lines first.
    const bool stream = reinterpret_cast<uintptr_t>(mask) % 64 == 0 && count == 65536;
    for (; done + 64 <= count; done += 64) {
      const Above above = block.step(x + done, mask + done, stream);
      result.above += __builtin_popcountll(above.low);
      uint64_t inside = above.low & ~above.high;
      if constexpr (kStore) {
        const auto store_one = [&] {
          const int64_t i = done + __builtin_ctzll(inside | uint64_t{1} << 63);
          bits[result.candidates] = x[i] & kMagnitude<T>;
          positions[result.candidates] = static_cast<uint16_t>(i);
          result.candidates += inside != 0;
          inside &= inside - 1;
        };
        // A block holds none, one or two at random: two are always written, kept or not, to have no branch to guess.
        store_one();
        store_one();
        while (inside != 0) {
          store_one();
        }
      } else {
        result.candidates += __builtin_popcountll(inside);
      }
    }
    if (stream) {
      _mm_sfence();
    }
    result.largest = block.maximum();
  }
#endif
  sweep_plain<T, kStore>(x, mask, done, count, low, middle, high, bits, positions, result);
  return result;
}

template <class T>
Sweep sweep(const T* x, uint8_t* mask, int64_t count, int64_t low, int64_t middle, int64_t high, T* bits,
            uint16_t* positions) {
  return bits != nullptr ? sweep_as<T, true>(x, mask, count, low, middle, high, bits, positions)
                         : sweep_as<T, false>(x, mask, count, low, middle, high, nullptr, nullptr);
}

}  // namespace

Sweep sweep16(const uint16_t* x, uint8_t* mask, int64_t count, int64_t low, int64_t middle, int64_t high,
              uint16_t* bits, uint16_t* positions) {
  return sweep(x, mask, count, low, middle, high, bits, positions);
}

Sweep sweep32(const uint32_t* x, uint8_t* mask, int64_t count, int64_t low, int64_t middle, int64_t high,
              uint32_t* bits, uint16_t* positions) {
  return sweep(x, mask, count, low, middle, high, bits, positions);
}

Sweep sweep64(const uint64_t* x, uint8_t* mask, int64_t count, int64_t low, int64_t middle, int64_t high,
              uint64_t* bits, uint16_t* positions) {
  return sweep(x, mask, count, low, middle, high, bits, positions);
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
