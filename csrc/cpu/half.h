// float16 and bfloat16 bits to float, without hardware help.
#pragma once

#include <bit>
#include <cstdint>

namespace pyprune {
namespace {

inline float bfloat16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline float float16_to_float(uint16_t bits) {
  // Multiplying by 2^112 rebiases the exponent and normalises denormals exactly; infinity and NaN keep theirs.
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t wide = (bits & 0x7c00) == 0x7c00 ? (magnitude | 0x7f800000) : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(wide | static_cast<uint32_t>(bits & 0x8000) << 16);
}

}  // namespace
}  // namespace pyprune
