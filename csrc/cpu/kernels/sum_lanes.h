// Sums in float64, in the order of norm_order.h within a block.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../norm_order.h"
#include "../half.h"
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

// Four at a time in the compiler's vector types: one source for every instruction set. Wider ones are no faster where
// memory is the limit, and g++ 12 lowers the conversion of eight floats badly for AVX2.
typedef double Double4 __attribute__((vector_size(32)));
typedef float Float4 __attribute__((vector_size(16)));
typedef uint32_t Uint4x32 __attribute__((vector_size(16)));
typedef int32_t Int4x32 __attribute__((vector_size(16)));

template <class Vector>
inline Vector load(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

// Conversions of four, each one instruction, which g++ 12 does not find by itself.
#if defined(__AVX__)
inline Double4 widened(Float4 v) {
  return _mm256_cvtps_pd(v);
}
inline Uint4x32 widened(const uint16_t* x) {
  return std::bit_cast<Uint4x32>(_mm_cvtepu16_epi32(_mm_loadu_si64(x)));
}
inline Int4x32 widened(const uint8_t* x) {
  return std::bit_cast<Int4x32>(_mm_cvtepu8_epi32(_mm_loadu_si32(x)));
}
inline Double4 widened(Int4x32 v) {
  return _mm256_cvtepi32_pd(std::bit_cast<__m128i>(v));
}
#else
typedef uint16_t Uint4x16 __attribute__((vector_size(8)));
typedef uint8_t Uint4x8 __attribute__((vector_size(4)));
inline Double4 widened(Float4 v) {
  return __builtin_convertvector(v, Double4);
}
inline Uint4x32 widened(const uint16_t* x) {
  return __builtin_convertvector(load<Uint4x16>(x), Uint4x32);
}
inline Int4x32 widened(const uint8_t* x) {
  return __builtin_convertvector(load<Uint4x8>(x), Int4x32);
}
inline Double4 widened(Int4x32 v) {
  return __builtin_convertvector(v, Double4);
}
#endif

#if defined(__AVX512F__)
typedef double Double8 __attribute__((vector_size(64)));
template <class Type>
Double8 load8(const typename Type::Item* x);
#endif

struct Float64 {
  using Item = double;
  static Double4 load4(const Item* x) { return load<Double4>(x); }
  static double load1(const Item* x) { return *x; }
};

struct Float32 {
  using Item = float;
  static Double4 load4(const Item* x) { return widened(load<Float4>(x)); }
  static double load1(const Item* x) { return *x; }
};

struct BFloat16 {
  using Item = uint16_t;
  static Double4 load4(const Item* x) { return widened(std::bit_cast<Float4>(widened(x) << 16)); }
  static double load1(const Item* x) { return bfloat16_to_float(*x); }
};

struct Float16 {
  using Item = uint16_t;
  static Double4 load4(const Item* x) {
#if defined(__F16C__)
    const __m128 wide = _mm_cvtph_ps(_mm_loadu_si64(x));
    return widened(std::bit_cast<Float4>(wide));
#else
    Double4 wide;
    for (int i = 0; i < 4; ++i) {
      wide[i] = float16_to_float(x[i]);
    }
    return wide;
#endif
  }
  static double load1(const Item* x) { return float16_to_float(*x); }
};

// False and true as 0 and 1.
struct Bool {
  using Item = uint8_t;
  static Double4 load4(const Item* x) { return widened(widened(x)); }
  static double load1(const Item* x) { return *x; }
};

#if defined(__AVX512F__)
template <>
inline Double8 load8<Float64>(const double* x) {
  return _mm512_loadu_pd(x);
}
template <>
inline Double8 load8<Float32>(const float* x) {
  return _mm512_cvtps_pd(_mm256_loadu_ps(x));
}
template <>
inline Double8 load8<Float16>(const uint16_t* x) {
  return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}
template <>
inline Double8 load8<BFloat16>(const uint16_t* x) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
}
template <>
inline Double8 load8<Bool>(const uint8_t* x) {
  return _mm512_cvtepi32_pd(_mm256_cvtepu8_epi32(_mm_loadu_si64(x)));
}
#endif

inline double add_lanes(double* lanes) {
  for (int64_t half = kNormLanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) {
      lanes[j] += lanes[j + half];
    }
  }
  return lanes[0];
}

template <class Type, class Term>
double sum_lanes(const typename Type::Item* x, int64_t count, const Term& term) {
  Double4 sums[kNormLanes / 4] = {};
  int64_t i = 0;
  for (; i + kNormLanes <= count; i += kNormLanes) {
    for (int64_t j = 0; j < kNormLanes / 4; ++j) {
      sums[j] += term(Type::load4(x + i + 4 * j));
    }
  }
  double lanes[kNormLanes];
  std::memcpy(lanes, sums, sizeof(sums));
  for (int64_t j = 0; i + j < count; ++j) {
    lanes[j] += term(Type::load1(x + i + j));
  }
  return add_lanes(lanes);
}

}  // namespace
}  // namespace pyprune::PYPRUNE_CAPABILITY
