// Polynomials modulo that of CRC-32, with the highest coefficient in the lowest bit.
#pragma once

#include <cstdint>

namespace pyprune {

constexpr uint32_t crc32_times_x(uint32_t a) {
  return (a >> 1) ^ ((a & 1) != 0 ? 0xedb88320u : 0u);
}

constexpr uint32_t crc32_product(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
    if ((a & bit) != 0) product ^= b;
    b = crc32_times_x(b);
  }
  return product;
}

// x^n
constexpr uint32_t crc32_power(uint64_t n) {
  uint32_t power = 0x80000000u, square = 0x40000000u;
  for (; n != 0; n >>= 1) {
    if ((n & 1) != 0) power = crc32_product(power, square);
    square = crc32_product(square, square);
  }
  return power;
}

}  // namespace pyprune
