// Philox for many counters at a time. Each 64-bit lane holds one 32-bit word (what lies above it is ignored), so that
// the widening multiplication needs no shuffles.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../philox.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kCounters = 8;
#elif defined(__AVX2__)
constexpr int kCounters = 4;
#else
constexpr int kCounters = 2;
#endif
typedef uint64_t Lanes __attribute__((vector_size(8 * kCounters)));
// The even lanes hold the first half of the blocks, the odd ones the second: interleaving puts them in order.
#if defined(__AVX512F__)
constexpr Lanes kOrder = {0, 4, 1, 5, 2, 6, 3, 7};
#elif defined(__AVX2__)
constexpr Lanes kOrder = {0, 2, 1, 3};
#else
constexpr Lanes kOrder = {0, 1};
#endif

inline Lanes multiply(Lanes x, uint32_t y) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(y));
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(y));
#elif defined(__SSE2__)
  return (Lanes)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(y));
#else
  return (x & 0xffffffff) * y;
#endif
}

// Joins the low words of two lanes each of (a, b) and (c, d): counter 2q and counter 2q + 1 of the 128-bit part q.
inline void interleave(Lanes ab, Lanes cd, Lanes& even, Lanes& odd) {
#if defined(__AVX512F__)
  even = (Lanes)_mm512_unpacklo_epi64((__m512i)ab, (__m512i)cd);
  odd = (Lanes)_mm512_unpackhi_epi64((__m512i)ab, (__m512i)cd);
#elif defined(__AVX2__)
  even = (Lanes)_mm256_unpacklo_epi64((__m256i)ab, (__m256i)cd);
  odd = (Lanes)_mm256_unpackhi_epi64((__m256i)ab, (__m256i)cd);
#else
  even = Lanes{ab[0], cd[0]};
  odd = Lanes{ab[1], cd[1]};
#endif
}

// Words of the blocks [block, block + kCounters) of a stream, in order.
inline void philox_lanes(uint64_t seed, uint64_t stream, uint64_t block, uint32_t* words) {
  Lanes a = kOrder + block;
  Lanes b = a >> 32, c = Lanes{} + stream, d = Lanes{} + (stream >> 32);
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Lanes first = multiply(a, kPhiloxMultiplier0);
    const Lanes second = multiply(c, kPhiloxMultiplier1);
    a = (second >> 32) ^ b ^ uint64_t{key0};
    b = second;
    c = (first >> 32) ^ d ^ uint64_t{key1};
    d = first;
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
  Lanes even, odd;
  interleave((a & 0xffffffff) | b << 32, (c & 0xffffffff) | d << 32, even, odd);
  std::memcpy(words, &even, sizeof(even));
  std::memcpy(words + 2 * kCounters, &odd, sizeof(odd));
}

}  // namespace
}  // namespace pyprune::PYPRUNE_CAPABILITY
