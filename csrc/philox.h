// Counter-based noise, the same bits on CPU and GPU: Philox4x32-10 (Salmon et al. 2011).
//
// Number i of a stream is word i % 4 of the block with counter (i / 4, stream) and the seed as key. Its upper 23 bits
// k stand for the uniform number (k + 0.5) / 2^23: never 0 or 1, and exact in float32, as 1 minus it is.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PYPRUNE_HOST_DEVICE __host__ __device__
#else
#define PYPRUNE_HOST_DEVICE
#endif

namespace pyprune {
namespace {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9;
constexpr uint32_t kPhiloxKeyStep1 = 0xBB67AE85;

struct PhiloxBlock {
  uint32_t words[4];
};

PYPRUNE_HOST_DEVICE inline PhiloxBlock philox(uint64_t seed, uint64_t stream, uint64_t block) {
  uint32_t a = static_cast<uint32_t>(block), b = static_cast<uint32_t>(block >> 32);
  uint32_t c = static_cast<uint32_t>(stream), d = static_cast<uint32_t>(stream >> 32);
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t first = uint64_t{kPhiloxMultiplier0} * a;
    const uint64_t second = uint64_t{kPhiloxMultiplier1} * c;
    a = static_cast<uint32_t>(second >> 32) ^ b ^ key0;
    b = static_cast<uint32_t>(second);
    c = static_cast<uint32_t>(first >> 32) ^ d ^ key1;
    d = static_cast<uint32_t>(first);
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
  return {{a, b, c, d}};
}

template <class Real>
PYPRUNE_HOST_DEVICE inline Real uniform(uint32_t word) {
  return (static_cast<Real>(static_cast<int32_t>(word >> 9)) + Real(0.5)) * Real(0x1p-23);
}

}  // namespace
}  // namespace pyprune
