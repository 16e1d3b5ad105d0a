#include "stream.h"

#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pyprune::PYPRUNE_CAPABILITY {

void stream_row(void* to, const void* from, int64_t bytes) {
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
#if defined(__SSE2__)
  // Whole cache lines only: parts of a line would be merged in memory.
  if (reinterpret_cast<uintptr_t>(target) % 64 == 0) {
    for (; bytes >= 64; bytes -= 64, target += 64, source += 64) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target), _mm512_loadu_si512(source));
#else
      for (int part = 0; part < 64; part += 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(target + part),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + part)));
      }
#endif
    }
    _mm_sfence();
  }
#endif
  std::memcpy(target, source, bytes);
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
