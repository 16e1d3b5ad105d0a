// 64 bytes of a mask from 64 bits, past the caches if `stream`.
#pragma once

#if defined(__AVX512BW__)

#include <immintrin.h>

#include <cstdint>

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

inline void store_mask(uint8_t* mask, uint64_t keep, bool stream) {
  const __m512i bytes = _mm512_maskz_set1_epi8(keep, 1);
  if (stream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(mask), bytes);
  } else {
    _mm512_storeu_si512(mask, bytes);
  }
}

}  // namespace
}  // namespace pyprune::PYPRUNE_CAPABILITY

#endif
