// What a C++ test needs: random numbers, every capability in turn, and a message where something is wrong.
#pragma once

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../cpu/capability.h"
#include "../cpu/half.h"
#include "../dtype.h"

#define EXPECT(condition)                                                                 \
  do {                                                                                    \
    if (!(condition)) {                                                                   \
      std::fprintf(stderr, "%s:%d: %s (%s, seed %llu)\n", __FILE__, __LINE__, #condition, \
                   pyprune::capability_name(), pyprune::test::seed);                      \
      std::exit(1);                                                                       \
    }                                                                                     \
  } while (false)

namespace pyprune {

void set_thread_count(int64_t count);  // of threads.cpp

}  // namespace pyprune

namespace pyprune::test {

// What the numbers are drawn from.
inline unsigned long long seed = 1;
inline std::mt19937_64 random_bits{seed};

inline int64_t random_between(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}

// Calls body() once per CPU capability.
template <class Body>
void with_each_capability(const Body& body) {
  for (const std::string& name : available_capabilities()) {
    set_capability(name);
    body();
  }
  set_capability("auto");
}

// Bits of finite weights of a 2, 4 or 8 byte type, some of them ties and zeros. Exactly as long as needed, so that a
// sanitizer sees each step beyond the end.
template <class Bits>
std::vector<Bits> random_weights(Dtype dtype, int64_t count) {
  std::vector<Bits> weights(count);
  for (Bits& bits : weights) {
    const uint64_t sign = random_bits() & 1;
    const uint64_t magnitude = random_between(0, 3) == 0 ? random_between(0, 2) << (8 * sizeof(Bits) - 3)
                                                         : random_bits() % infinity_bits(dtype);
    bits = static_cast<Bits>(magnitude | sign << (8 * sizeof(Bits) - 1));
  }
  return weights;
}

inline double value_of(Dtype dtype, uint64_t bits) {
  switch (dtype) {
    case Dtype::kFloat64: return std::bit_cast<double>(bits);
    case Dtype::kFloat32: return std::bit_cast<float>(static_cast<uint32_t>(bits));
    case Dtype::kFloat16: return float16_to_float(static_cast<uint16_t>(bits));
    default: return bfloat16_to_float(static_cast<uint16_t>(bits));
  }
}

}  // namespace pyprune::test
