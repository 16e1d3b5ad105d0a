// Element types as the kernels see them: magnitudes as unsigned bits, which order like the magnitudes themselves.
#pragma once

#include <cstdint>

namespace pyprune {

enum class Dtype : uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16, kBool };

constexpr int64_t item_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return 8;
    case Dtype::kFloat32: return 4;
    case Dtype::kBool: return 1;
    default: return 2;
  }
}

// Bits of +infinity: a magnitude is finite if its bits are below, NaN if above.
constexpr uint64_t infinity_bits(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return 0x7ff0000000000000;
    case Dtype::kFloat32: return 0x7f800000;
    case Dtype::kFloat16: return 0x7c00;
    default: return 0x7f80;
  }
}

// Everything but the sign bit.
template <class T>
constexpr T kMagnitude = static_cast<T>(~T{0}) >> 1;

}  // namespace pyprune
