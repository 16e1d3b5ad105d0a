// Scores as integer keys that order like them, and back: which magnitudes have a key up to a bound.
#pragma once

#include <bit>
#include <cstdint>

#include "../dtype.h"
#include "half.h"

namespace pyprune {

// Calls visit with a zero of the unsigned type that holds the bits of a float dtype.
template <class Visit>
void by_bits(Dtype dtype, const Visit& visit) {
  switch (item_size(dtype)) {
    case 2: return visit(uint16_t{});
    case 4: return visit(uint32_t{});
    default: return visit(uint64_t{});
  }
}

// Scores of one weight. The key is the bit pattern of the score, float32(|w| * scale) or, if wide, float64(|w| *
// scale); it never falls as the magnitude grows, so a bound on keys is a bound on the bits of |w|: the sweep needs no
// arithmetic.
struct Score {
  Dtype dtype;
  bool scaled;
  bool wide;
  double scale;

  static constexpr int kKeyBits = 63;
  // Low bits of the key that are always zero: half types, widened to float32, leave some.
  int unused_key_bits() const {
    const bool widened = !scaled && !wide;
    return widened && dtype == Dtype::kBFloat16 ? 16 : widened && dtype == Dtype::kFloat16 ? 13 : 0;
  }

  int64_t largest_bits() const { return static_cast<int64_t>((uint64_t{1} << (8 * item_size(dtype) - 1)) - 1); }
  static constexpr int64_t largest_key(bool wide) { return wide ? INT64_MAX : INT32_MAX; }
  static constexpr int64_t infinity_key(bool wide) {
    return static_cast<int64_t>(infinity_bits(wide ? Dtype::kFloat64 : Dtype::kFloat32));
  }

  // Calls use(key_of), where key_of(bits) is the key of a magnitude that is not NaN: for loops, with the dtype known.
  template <class Use>
  auto with_key(const Use& use) const {
    switch (dtype) {
      case Dtype::kFloat64: return use([this](uint64_t bits) { return key_of(std::bit_cast<double>(bits)); });
      case Dtype::kFloat32:
        if (!scaled && !wide) {
          return use([](uint64_t bits) { return static_cast<int64_t>(bits); });
        }
        return use([this](uint64_t bits) { return key_of(std::bit_cast<float>(static_cast<uint32_t>(bits))); });
      case Dtype::kFloat16:
        return use([this](uint64_t bits) { return key_of(float16_to_float(static_cast<uint16_t>(bits))); });
      default: return use([this](uint64_t bits) { return key_of(bfloat16_to_float(static_cast<uint16_t>(bits))); });
    }
  }

  int64_t key(uint64_t bits) const {
    if (bits > infinity_bits(dtype)) {
      return largest_key(wide);  // NaN, above everything
    }
    return with_key([bits](const auto& key_of) { return key_of(bits); });
  }

  // Largest magnitude bits whose key is not above `bound`; -1 if there are none.
  int64_t bits_up_to(int64_t bound) const {
    if (bound >= largest_key(wide)) {
      return largest_bits();
    }
    int64_t below = -1, above = static_cast<int64_t>(infinity_bits(dtype)) + 1;
    while (above - below > 1) {
      const int64_t middle = below + (above - below) / 2;
      (key(static_cast<uint64_t>(middle)) <= bound ? below : above) = middle;
    }
    return below;
  }

 private:
  int64_t key_of(double magnitude) const {
    const double score = scaled ? magnitude * scale : magnitude;
    return wide ? std::bit_cast<int64_t>(score) : std::bit_cast<int32_t>(static_cast<float>(score));
  }
};

}  // namespace pyprune
