#include "threshold.h"

#include "norms.h"
#include "sweep_block.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

// What is left when whole blocks are done, and everything where there are no blocks. Sums in the elements' own width,
// so that the compiler can vectorise the loop over 64 of them.
template <class T, bool kStore, bool kBased>
void sweep_plain(const T* x, const uint8_t* base, uint8_t* mask, int64_t begin, int64_t end, const Bounds& bounds,
                 T* bits, uint16_t* positions, Sweep& result) {
  const auto [low, middle, high] = bounds;
  // Bounds moved up by one, so that the comparison needs no sign: they may be -1.
  const T lo = static_cast<T>(low) + T{1}, mid = static_cast<T>(middle) + T{1}, hi = static_cast<T>(high) + T{1};
  T largest = 0;
  for (int64_t start = begin; start < end; start += 64) {
    const int64_t stop = start + 64 < end ? start + 64 : end;
    T above_low = 0, inside = 0;
    for (int64_t i = start; i < stop; ++i) {
      const T magnitude = x[i] & kMagnitude<T>;
      const bool competes = !kBased || base[i] != 0;
      const T above = static_cast<T>((magnitude + T{1} > lo) & competes);
      mask[i] = static_cast<uint8_t>((magnitude + T{1} > mid) & competes);
      above_low += above;
      inside += above & static_cast<T>(magnitude + T{1} <= hi);
      largest = magnitude > largest ? magnitude : largest;
    }
    if (kStore && inside != 0) {
      for (int64_t i = start; i < stop; ++i) {
        const int64_t magnitude = static_cast<int64_t>(x[i] & kMagnitude<T>);
        if (magnitude > low && magnitude <= high && (!kBased || base[i] != 0)) {
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

// Whole steps of 64 elements; returns where the rest begins.
template <class T, bool kStore, bool kBased>
int64_t sweep_steps(Block<T>& block, const T* x, const uint8_t* base, uint8_t* mask, int64_t count, bool stream,
                    const char* fetch, T* bits, uint16_t* positions, Sweep& result) {
  int64_t done = 0;
  for (; done + 64 <= count; done += 64) {
    for (size_t line = 0; fetch != nullptr && line < sizeof(T); ++line) {
      __builtin_prefetch(fetch + done * sizeof(T) + line * 64);
    }
    const Above above = block.template step<kBased>(x + done, kBased ? base + done : nullptr, mask + done, stream);
    result.above += __builtin_popcountll(above.low);
    uint64_t inside = above.low & ~above.high;
    if constexpr (kStore) {
      for (; inside != 0; inside &= inside - 1) {
        const int64_t i = done + __builtin_ctzll(inside);
        bits[result.candidates] = x[i] & kMagnitude<T>;
        positions[result.candidates++] = static_cast<uint16_t>(i);
      }
    } else {
      result.candidates += __builtin_popcountll(inside);
    }
  }
  return done;
}

template <class T, bool kStore, bool kBased>
Sweep sweep_as(const T* x, const uint8_t* base, uint8_t* mask, int64_t count, const Bounds& bounds, T* bits,
               uint16_t* positions, const Errands& errands) {
  Sweep result;
  Block<T> block(bounds.low, bounds.middle, bounds.high);
  // A mask is read again long after it has left the cache: streaming saves reading its lines first.
  const bool stream = reinterpret_cast<uintptr_t>(mask) % 64 == 0 && count >= kNormBlock;
  int64_t done = 0;
  if constexpr (kHasBlock<T>) {
    const char* const fetch = static_cast<const char*>(errands.fetch);
    done = sweep_steps<T, kStore, kBased>(block, x, base, mask, count, stream, fetch, bits, positions, result);
  }
  sweep_plain<T, kStore, kBased>(x, base, mask, done, count, bounds, bits, positions, result);
  if (errands.squares != nullptr) {
    sum_squares(x, errands.dtype, count, 1.0, errands.squares);  // from the second-level cache
  }
  if (block.maximum() > result.largest) {
    result.largest = block.maximum();
  }
  if (stream) {
    end_streaming();
  }
  return result;
}

template <class T>
Sweep sweep(const T* x, const uint8_t* base, uint8_t* mask, int64_t count, const Bounds& bounds, T* bits,
            uint16_t* positions, const Errands& errands) {
  if (bits == nullptr) {
    return base != nullptr ? sweep_as<T, false, true>(x, base, mask, count, bounds, nullptr, nullptr, errands)
                           : sweep_as<T, false, false>(x, nullptr, mask, count, bounds, nullptr, nullptr, errands);
  }
  return base != nullptr ? sweep_as<T, true, true>(x, base, mask, count, bounds, bits, positions, errands)
                         : sweep_as<T, true, false>(x, nullptr, mask, count, bounds, bits, positions, errands);
}

}  // namespace

Sweep sweep16(const uint16_t* x, const uint8_t* base, uint8_t* mask, int64_t count, const Bounds& bounds,
              uint16_t* bits, uint16_t* positions, const Errands& errands) {
  return sweep(x, base, mask, count, bounds, bits, positions, errands);
}

Sweep sweep32(const uint32_t* x, const uint8_t* base, uint8_t* mask, int64_t count, const Bounds& bounds,
              uint32_t* bits, uint16_t* positions, const Errands& errands) {
  return sweep(x, base, mask, count, bounds, bits, positions, errands);
}

Sweep sweep64(const uint64_t* x, const uint8_t* base, uint8_t* mask, int64_t count, const Bounds& bounds,
              uint64_t* bits, uint16_t* positions, const Errands& errands) {
  return sweep(x, base, mask, count, bounds, bits, positions, errands);
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
