// Scores as unsigned keys of the same order: |w| or |w| * scale, its bits without the sign.
#pragma once

#include <cmath>

#include "search.cuh"

namespace pyprune {
namespace {

// Key: uint32_t for float32 scores, uint64_t for float64. kScaled: scales[tensor * stride] multiplies, in float64 and
// rounded once.
template <typename Key, bool kScaled>
struct Scores {
  using KeyType = Key;
  static constexpr bool kWide = sizeof(Key) == 8;
  static constexpr int kKeyBits = 8 * sizeof(Key) - 1;
  static constexpr uint64_t kInfinity = infinity_bits(kWide ? Dtype::kFloat64 : Dtype::kFloat32);

  const double* scales;
  int64_t stride;
  bool per_tensor;  // every tensor is a group of its own
  int zeros;        // low bits that are zero in all keys

  __device__ int64_t group(int32_t tensor) const { return per_tensor ? tensor : 0; }

  __device__ double scale(int32_t tensor) const {
    if constexpr (!kScaled) return 1;
    const double scale = scales[tensor * stride];
    return scale >= 0 && scale < HUGE_VAL ? scale : 0;  // NaN fails the first comparison
  }

  template <typename T>
  __device__ static Key key(typename T::Bits bits, double scale) {
    const auto value = T::value(bits);
    if constexpr (kWide) {
      const double score = kScaled ? static_cast<double>(value) * scale : static_cast<double>(value);
      return static_cast<uint64_t>(__double_as_longlong(score)) & kMagnitude<uint64_t>;
    } else {
      const float score =
          kScaled ? static_cast<float>(static_cast<double>(value) * scale) : static_cast<float>(value);
      return __float_as_uint(score) & kMagnitude<uint32_t>;
    }
  }

  // The first magnitude, as bits, whose key is not below `bound`. Keys never fall as magnitudes grow. Infinity's
  // neighbour if there is none; NaN goes with what is above, unless the bound is above all keys.
  __device__ uint64_t first_from(Dtype dtype, uint64_t bound, double scale) const {
    uint64_t low = 0, high = 0;
    with_weight_type<kWide>(dtype, [&](auto type) {
      using T = decltype(type);
      constexpr uint64_t kAll = uint64_t{kMagnitude<typename T::Bits>} + 1;
      high = bound == kAboveAll ? kAll : T::kInfinity + 1;
      while (bound != kAboveAll && low < high) {
        const uint64_t middle = (low + high) / 2;
        if (key<T>(static_cast<typename T::Bits>(middle), scale) < bound) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
    });
    return high;
  }

  static constexpr uint64_t kAboveAll = ~uint64_t{0};
};

}  // namespace
}  // namespace pyprune
