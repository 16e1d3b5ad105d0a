// Vectors of float as wide as the registers, with multiply-adds; and values of all types as float.
#pragma once

#include <cstring>

#include "../../sparse_layout.h"
#include "../half.h"
#include "capability_namespace.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kLaneBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kLaneBytes = 32;
#else
constexpr int64_t kLaneBytes = 16;
#endif
constexpr int64_t kWidth = kLaneBytes / sizeof(float);
typedef float Floats __attribute__((vector_size(kLaneBytes)));
typedef float LooseFloats __attribute__((vector_size(kLaneBytes), aligned(4), may_alias));

inline Floats load(const float* x) {
  return *reinterpret_cast<const LooseFloats*>(x);
}

inline void store(float* x, Floats value) {
  *reinterpret_cast<LooseFloats*>(x) = value;
}

// a * b + c. Where the machine has no instruction for it, the product is rounded first.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__aarch64__)
  return reinterpret_cast<Floats>(vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a),
                                            reinterpret_cast<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}

inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// One row for each of four lanes.
typedef float Four __attribute__((vector_size(16)));

inline Four multiply_add(Four a, float b, Four c) {
#if defined(__FMA__)
  return reinterpret_cast<Four>(
      _mm_fmadd_ps(reinterpret_cast<__m128>(a), _mm_set1_ps(b), reinterpret_cast<__m128>(c)));
#elif defined(__aarch64__)
  return reinterpret_cast<Four>(vfmaq_n_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a), b));
#else
  return a * b + c;
#endif
}

inline Floats broadcast(float x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_set1_ps(x));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_set1_ps(x));
#else
  return Floats{} + x;
#endif
}

// Four numbers again and again, with one load.
inline Floats repeat_four(const float* x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_broadcast_f32x4(_mm_loadu_ps(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(x)));
#else
  return load(x);
#endif
}

// The one of the four with this number, in all lanes.
template <int kNumber>
inline Floats one_of_four(Floats four) {
  typedef int32_t Lanes __attribute__((vector_size(kLaneBytes)));
  Lanes from{};
  for (int lane = 0; lane < kWidth; ++lane) {
    from[lane] = lane / 4 * 4 + kNumber;
  }
  return __builtin_shuffle(four, from);
}

// So many values as float, and up to 15 more: memory must be there on both sides.
inline void widen(SparseValue type, const void* values, int64_t first, int64_t count, float* to) {
  count = (count + 15) / 16 * 16;
  switch (type) {
    case SparseValue::kFloat32: {
      std::memcpy(to, static_cast<const float*>(values) + first, count * sizeof(float));
      return;
    }
    case SparseValue::kBFloat16: {
      const uint16_t* const from = static_cast<const uint16_t*>(values) + first;
      for (int64_t i = 0; i < count; ++i) {
        to[i] = bfloat16_to_float(from[i]);
      }
      return;
    }
    case SparseValue::kFloat16: {
      const uint16_t* const from = static_cast<const uint16_t*>(values) + first;
#if defined(__F16C__)
      for (int64_t i = 0; i < count; i += 8) {
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
      }
#else
      for (int64_t i = 0; i < count; ++i) {
        to[i] = float16_to_float(from[i]);
      }
#endif
      return;
    }
    case SparseValue::kInt8: {
      const int8_t* const from = static_cast<const int8_t*>(values) + first;
      for (int64_t i = 0; i < count; ++i) {
        to[i] = from[i];
      }
    }
  }
}

}  // namespace
}  // namespace pyprune::PYPRUNE_CAPABILITY
