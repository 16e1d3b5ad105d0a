// float16 and bfloat16 bits to float and back, rounded to nearest even, without hardware help.
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

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded);  // NaN stays NaN
}

inline uint16_t float_to_float16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  // From 2^-14 on, 13 bits are rounded off and the exponent is rebiased; adding 1/2 rounds what is below to a
  // multiple of 2^-24 and leaves it in the low bits.
  const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  const uint32_t tiny = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t finite = magnitude < 0x38800000 ? tiny : normal;
  const uint32_t half = magnitude > 0x7f800000 ? 0x7e00 : magnitude >= 0x477ff000 ? 0x7c00 : finite;
  return static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}

}  // namespace
}  // namespace pyprune
