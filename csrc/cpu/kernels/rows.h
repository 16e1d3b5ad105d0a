// Rows of elements as floats and back, and the choice between float and double.
#pragma once

#include <cstdint>

#include "../../dtype.h"
#include "../half.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

// Calls use(0.0) or use(0.0f).
template <class Use>
inline void with_real(bool wide, const Use& use) {
  if (wide) {
    use(0.0);
  } else {
    use(0.0f);
  }
}

// The values as floats: where they are, if they are floats, or in `room`. Not for float64.
inline const float* widened(Dtype dtype, const void* from, int64_t count, float* __restrict room) {
  if (dtype == Dtype::kFloat32) {
    return static_cast<const float*>(from);
  }
  const uint16_t* __restrict x = static_cast<const uint16_t*>(from);
  if (dtype == Dtype::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) {
      room[i] = bfloat16_to_float(x[i]);
    }
    return room;
  }
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(room + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  }
#endif
  for (; i < count; ++i) {
    room[i] = float16_to_float(x[i]);
  }
  return room;
}

// Rounds floats to the nearest half; nothing to do for float32, where they have been written already.
inline void narrow(Dtype dtype, const float* __restrict x, int64_t count, void* to) {
  uint16_t* __restrict out = static_cast<uint16_t*>(to);
  if (dtype == Dtype::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = float_to_bfloat16(x[i]);
    }
  } else if (dtype == Dtype::kFloat16) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    for (; i < count; ++i) {
      out[i] = float_to_float16(x[i]);
    }
  }
}

}  // namespace
}  // namespace pyprune::PYPRUNE_CAPABILITY
