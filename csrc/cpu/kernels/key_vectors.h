// Vectors of signed keys, as wide as the file is compiled for.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "store_mask.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

#if defined(__AVX512BW__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class Key>
struct Lanes {
  static constexpr int kWidth = kVectorBytes / sizeof(Key);
  typedef Key Vector __attribute__((vector_size(kVectorBytes), may_alias));
  typedef uint8_t Bytes __attribute__((vector_size(kWidth), may_alias));

  static Vector load(const Key* keys) {
    Vector vector;
    __builtin_memcpy(&vector, keys, sizeof(vector));
    return vector;
  }
};

#if defined(__AVX512BW__)

template <class Key>
__m512i larger(__m512i a, __m512i b) {
  if constexpr (sizeof(Key) == 2) {
    return _mm512_max_epi16(a, b);
  } else if constexpr (sizeof(Key) == 4) {
    return _mm512_max_epi32(a, b);
  } else {
    return _mm512_max_epi64(a, b);
  }
}

template <class Key>
__m512i less(__m512i a, __m512i b) {
  if constexpr (sizeof(Key) == 2) {
    return _mm512_sub_epi16(a, b);
  } else if constexpr (sizeof(Key) == 4) {
    return _mm512_sub_epi32(a, b);
  } else {
    return _mm512_sub_epi64(a, b);
  }
}

// Bit i: lane i of a is above lane i of b.
template <class Key>
uint64_t above(__m512i a, __m512i b) {
  if constexpr (sizeof(Key) == 2) {
    return _mm512_cmpgt_epi16_mask(a, b);
  } else if constexpr (sizeof(Key) == 4) {
    return _mm512_cmpgt_epi32_mask(a, b);
  } else {
    return _mm512_cmpgt_epi64_mask(a, b);
  }
}

template <class Key>
__m512i all_lanes(Key value) {
  if constexpr (sizeof(Key) == 2) {
    return _mm512_set1_epi16(value);
  } else if constexpr (sizeof(Key) == 4) {
    return _mm512_set1_epi32(value);
  } else {
    return _mm512_set1_epi64(value);
  }
}

#endif

}  // namespace
}  // namespace pyprune::PYPRUNE_CAPABILITY
