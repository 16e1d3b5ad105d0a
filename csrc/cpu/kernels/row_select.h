// The smallest key that stays of a long group, searched between bounds that close in: all keys are counted a few
// times, in cache.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "../../dtype.h"
#include "../half.h"
#include "key_vectors.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

// Some keys, one after the other: what is left of `bits` under `magnitude`.
template <class Key>
struct KeyRun {
  const Key* bits;
  Key magnitude;
  int64_t count;
};

template <class Key>
[[gnu::noinline]] int64_t count_above(const KeyRun<Key>& run, Key bound) {
  using L = Lanes<Key>;
  constexpr int64_t kPiece = 4096;  // counts in lanes of 16 bits hold this
  int64_t result = 0;
  for (int64_t start = 0; start < run.count; start += kPiece) {
    const int64_t end = run.count - start < kPiece ? run.count : start + kPiece;
    typename L::Vector a{}, b{};
    int64_t i = start;
    for (; i + 2 * L::kWidth <= end; i += 2 * L::kWidth) {
      a -= (L::load(run.bits + i) & run.magnitude) > bound;
      b -= (L::load(run.bits + i + L::kWidth) & run.magnitude) > bound;
    }
    for (; i < end; ++i) {
      result += (run.bits[i] & run.magnitude) > bound;
    }
    a += b;
    for (int lane = 0; lane < L::kWidth; ++lane) {
      result += a[lane];
    }
  }
  return result;
}

template <class Key>
[[gnu::noinline]] void write_above(const KeyRun<Key>& run, Key bound, uint8_t* mask) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  constexpr int kWidth = Lanes<Key>::kWidth;
  const bool stream = reinterpret_cast<uintptr_t>(mask) % 64 == 0 && run.count >= 512;
  const __m512i magnitudes = all_lanes(run.magnitude), bounds = all_lanes(bound);
  for (; i + 64 <= run.count; i += 64) {
    uint64_t keep = 0;
    for (int part = 0; part < 64; part += kWidth) {
      const __m512i v = _mm512_and_si512(_mm512_loadu_si512(run.bits + i + part), magnitudes);
      keep |= above<Key>(v, bounds) << part;
    }
    store_mask(mask + i, keep, stream);
  }
  if (stream) {
    _mm_sfence();
  }
#else
  using L = Lanes<Key>;
  for (; i + L::kWidth <= run.count; i += L::kWidth) {
    const auto keep = __builtin_convertvector((L::load(run.bits + i) & run.magnitude) > bound, typename L::Bytes) & 1;
    __builtin_memcpy(mask + i, &keep, sizeof(keep));
  }
#endif
  for (; i < run.count; ++i) {
    mask[i] = (run.bits[i] & run.magnitude) > bound;
  }
}

// Numbers that order like the keys, for interpolation. `scores` is the type that the keys are the bits of.
template <class Key>
double value_of(Dtype scores, Key key) {
  if constexpr (sizeof(Key) == 8) {
    return std::bit_cast<double>(key);
  } else if constexpr (sizeof(Key) == 4) {
    return std::bit_cast<float>(key);
  } else {
    const uint16_t bits = static_cast<uint16_t>(key);
    return scores == Dtype::kBFloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
  }
}

template <class Key>
Key key_of(Dtype scores, double value) {
  if constexpr (sizeof(Key) == 8) {
    return std::bit_cast<Key>(value);
  } else if constexpr (sizeof(Key) == 4) {
    return std::bit_cast<Key>(static_cast<float>(value));
  } else {
    const float narrow = static_cast<float>(value);
    return static_cast<Key>(scores == Dtype::kBFloat16 ? float_to_bfloat16(narrow) : float_to_float16(narrow));
  }
}

// What stays: keys above `bound`, but of those that are equal to `bound` + 1 not the first `going`.
template <class Key>
struct Cut {
  Key bound;
  int64_t going;
};

// `count_above(bound)` counts keys; `present` of them are not negative, none is above `largest`. `guess` is tried
// first.
template <class Key, class CountAbove>
Cut<Key> find_cut(Dtype scores, int64_t present, int64_t kept, Key largest, Key guess,
                  const CountAbove& count_above) {
  if (present <= kept) {
    return {-1, 0};
  }
  if (kept == 0) {
    return {largest, 0};
  }
  Key low = -1, high = largest;  // more than `kept` keys are above low, and fewer above high
  int64_t above_low = present, above_high = 0;
  for (int step = 0;; ++step) {
    const uint64_t between = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
    if (between <= 1) {
      return {low, above_low - kept};
    }
    Key middle = static_cast<Key>(low + static_cast<Key>(between / 2));
    if (step == 0 && low < guess && guess < high) {
      middle = guess;
    } else if (step % 3 != 2) {
      const double from = low < 0 ? 0 : value_of(scores, low), to = value_of(scores, high);
      const double share = static_cast<double>(above_low - kept) / static_cast<double>(above_low - above_high);
      const double value = from + (to - from) * share;
      if (std::isfinite(value)) {
        const Key key = key_of<Key>(scores, value);
        middle = key <= low ? static_cast<Key>(low + 1) : key >= high ? static_cast<Key>(high - 1) : key;
      }
    }
    const int64_t above = count_above(middle);
    if (above == kept) {
      return {middle, 0};
    }
    if (above > kept) {
      low = middle, above_low = above;
    } else {
      high = middle, above_high = above;
    }
  }
}

}  // namespace
}  // namespace pyprune::PYPRUNE_CAPABILITY
