// One step of the sweep, 64 elements: Block<T>::step writes 64 mask bytes (|x| > middle) and returns two bit masks.
// With a base, what it lacks is not kept, and not above the low bound.
// The widest instruction set that the file is compiled for decides how; without any, HasBlock<T> is false.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "store_mask.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

struct Above {
  uint64_t low, high;  // bit i: element i is above the low, the high bound (of `high`, also if the base lacks it)
};

template <class T>
constexpr bool kHasBlock = false;

// Without instructions for it, step is missing, and no step is made.
template <class T>
struct Block {
  Block(int64_t, int64_t, int64_t) {}
  uint64_t maximum() const { return 0; }
};

inline void end_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

#if defined(__SSE2__)
template <>
constexpr bool kHasBlock<uint16_t> = true;
template <>
constexpr bool kHasBlock<uint32_t> = true;
#endif

#if defined(__AVX512BW__)

inline uint64_t nonzero(const uint8_t* bytes) {
  const __m512i v = _mm512_loadu_si512(bytes);
  return _mm512_test_epi8_mask(v, v);
}
template <>
struct Block<uint32_t> {
  __m512i lo, mid, hi, largest = _mm512_setzero_si512();
  Block(int64_t low, int64_t middle, int64_t high)
      : lo(_mm512_set1_epi32(static_cast<int>(low))),
        mid(_mm512_set1_epi32(static_cast<int>(middle))),
        hi(_mm512_set1_epi32(static_cast<int>(high))) {}
  template <bool kBased>
  Above step(const uint32_t* x, const uint8_t* base, uint8_t* mask, bool stream) {
    Above above{0, 0};
    uint64_t keep = 0;
    for (int part = 0; part < 4; ++part) {
      const __m512i v = _mm512_and_si512(_mm512_loadu_si512(x + 16 * part), _mm512_set1_epi32(0x7fffffff));
      above.low |= static_cast<uint64_t>(_mm512_cmpgt_epi32_mask(v, lo)) << (16 * part);
      keep |= static_cast<uint64_t>(_mm512_cmpgt_epi32_mask(v, mid)) << (16 * part);
      above.high |= static_cast<uint64_t>(_mm512_cmpgt_epi32_mask(v, hi)) << (16 * part);
      largest = _mm512_max_epi32(largest, v);
    }
    if constexpr (kBased) {
      const uint64_t competing = nonzero(base);
      above.low &= competing;
      keep &= competing;
    }
    store_mask(mask, keep, stream);
    return above;
  }
  uint64_t maximum() const { return static_cast<uint64_t>(_mm512_reduce_max_epi32(largest)); }
};

template <>
struct Block<uint16_t> {
  __m512i lo, mid, hi, largest = _mm512_setzero_si512();
  Block(int64_t low, int64_t middle, int64_t high)
      : lo(_mm512_set1_epi16(static_cast<short>(low))),
        mid(_mm512_set1_epi16(static_cast<short>(middle))),
        hi(_mm512_set1_epi16(static_cast<short>(high))) {}
  template <bool kBased>
  Above step(const uint16_t* x, const uint8_t* base, uint8_t* mask, bool stream) {
    Above above{0, 0};
    uint64_t keep = 0;
    for (int part = 0; part < 2; ++part) {
      const __m512i v = _mm512_and_si512(_mm512_loadu_si512(x + 32 * part), _mm512_set1_epi16(0x7fff));
      above.low |= static_cast<uint64_t>(_mm512_cmpgt_epi16_mask(v, lo)) << (32 * part);
      keep |= static_cast<uint64_t>(_mm512_cmpgt_epi16_mask(v, mid)) << (32 * part);
      above.high |= static_cast<uint64_t>(_mm512_cmpgt_epi16_mask(v, hi)) << (32 * part);
      largest = _mm512_max_epi16(largest, v);
    }
    if constexpr (kBased) {
      const uint64_t competing = nonzero(base);
      above.low &= competing;
      keep &= competing;
    }
    store_mask(mask, keep, stream);
    return above;
  }
  uint64_t maximum() const {
    const __m512i odd = _mm512_srli_epi32(largest, 16), even = _mm512_and_si512(largest, _mm512_set1_epi32(0xffff));
    return static_cast<uint64_t>(_mm512_reduce_max_epi32(_mm512_max_epi32(odd, even)));
  }
};

#elif defined(__SSE2__)

// Comparisons give whole lanes; packing them down gives the mask bytes, and a movemask of those the bits. The same
// shape in AVX2 (whose packs work within halves and need a permutation) and SSE2.
#if defined(__AVX2__)

using Vector = __m256i;
inline Vector load(const void* x) {
  return _mm256_loadu_si256(static_cast<const Vector*>(x));
}
inline Vector set32(int v) {
  return _mm256_set1_epi32(v);
}
inline Vector set16(short v) {
  return _mm256_set1_epi16(v);
}
inline Vector both(Vector a, Vector b) {
  return _mm256_and_si256(a, b);
}
inline Vector above32(Vector a, Vector b) {
  return _mm256_cmpgt_epi32(a, b);
}
inline Vector above16(Vector a, Vector b) {
  return _mm256_cmpgt_epi16(a, b);
}
inline Vector larger32(Vector a, Vector b) {
  return _mm256_max_epi32(a, b);
}
inline Vector larger16(Vector a, Vector b) {
  return _mm256_max_epi16(a, b);
}
inline Vector bytes_of(Vector a, Vector b, Vector c, Vector d) {
  const Vector packed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
inline Vector bytes_of(Vector a, Vector b) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0b11011000);
}
inline Vector where_nonzero(const uint8_t* base, Vector bytes) {
  return _mm256_andnot_si256(_mm256_cmpeq_epi8(load(base), _mm256_setzero_si256()), bytes);
}
inline uint64_t bits_of(Vector bytes) {
  return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}
inline void store_mask(uint8_t* mask, Vector bytes, bool stream) {
  const Vector ones = _mm256_and_si256(bytes, _mm256_set1_epi8(1));
  if (stream) {
    _mm256_stream_si256(reinterpret_cast<Vector*>(mask), ones);
  } else {
    _mm256_storeu_si256(reinterpret_cast<Vector*>(mask), ones);
  }
}

#else

using Vector = __m128i;
inline Vector load(const void* x) {
  return _mm_loadu_si128(static_cast<const Vector*>(x));
}
inline Vector set32(int v) {
  return _mm_set1_epi32(v);
}
inline Vector set16(short v) {
  return _mm_set1_epi16(v);
}
inline Vector both(Vector a, Vector b) {
  return _mm_and_si128(a, b);
}
inline Vector above32(Vector a, Vector b) {
  return _mm_cmpgt_epi32(a, b);
}
inline Vector above16(Vector a, Vector b) {
  return _mm_cmpgt_epi16(a, b);
}
inline Vector larger32(Vector a, Vector b) {
  const Vector larger = _mm_cmpgt_epi32(a, b);
  return _mm_or_si128(_mm_and_si128(larger, a), _mm_andnot_si128(larger, b));
}
inline Vector larger16(Vector a, Vector b) {
  return _mm_max_epi16(a, b);
}
inline Vector bytes_of(Vector a, Vector b, Vector c, Vector d) {
  return _mm_packs_epi16(_mm_packs_epi32(a, b), _mm_packs_epi32(c, d));
}
inline Vector bytes_of(Vector a, Vector b) {
  return _mm_packs_epi16(a, b);
}
inline Vector where_nonzero(const uint8_t* base, Vector bytes) {
  return _mm_andnot_si128(_mm_cmpeq_epi8(load(base), _mm_setzero_si128()), bytes);
}
inline uint64_t bits_of(Vector bytes) {
  return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
}
inline void store_mask(uint8_t* mask, Vector bytes, bool stream) {
  const Vector ones = _mm_and_si128(bytes, _mm_set1_epi8(1));
  if (stream) {
    _mm_stream_si128(reinterpret_cast<Vector*>(mask), ones);
  } else {
    _mm_storeu_si128(reinterpret_cast<Vector*>(mask), ones);
  }
}

#endif

template <class T>
uint64_t maximum_of(Vector v) {
  T lanes[sizeof(Vector) / sizeof(T)];
  __builtin_memcpy(lanes, &v, sizeof(v));
  T result = 0;
  for (T lane : lanes) {
    result = lane > result ? lane : result;
  }
  return result;
}

template <>
struct Block<uint32_t> {
  Vector lo, mid, hi, largest = set32(0);
  Block(int64_t low, int64_t middle, int64_t high)
      : lo(set32(static_cast<int>(low))), mid(set32(static_cast<int>(middle))), hi(set32(static_cast<int>(high))) {}
  template <bool kBased>
  Above step(const uint32_t* x, const uint8_t* base, uint8_t* mask, bool stream) {
    Above above{0, 0};
    constexpr int kWidth = sizeof(Vector);  // elements that make one vector of mask bytes
    for (int part = 0; part < 64; part += kWidth) {
      Vector v[4];
      for (int i = 0; i < 4; ++i) {
        v[i] = both(load(x + part + i * kWidth / 4), set32(0x7fffffff));
        largest = larger32(largest, v[i]);
      }
      Vector low = bytes_of(above32(v[0], lo), above32(v[1], lo), above32(v[2], lo), above32(v[3], lo));
      Vector keep = bytes_of(above32(v[0], mid), above32(v[1], mid), above32(v[2], mid), above32(v[3], mid));
      const Vector high = bytes_of(above32(v[0], hi), above32(v[1], hi), above32(v[2], hi), above32(v[3], hi));
      if constexpr (kBased) {
        low = where_nonzero(base + part, low);
        keep = where_nonzero(base + part, keep);
      }
      store_mask(mask + part, keep, stream);
      above.low |= bits_of(low) << part;
      above.high |= bits_of(high) << part;
    }
    return above;
  }
  uint64_t maximum() const { return maximum_of<uint32_t>(largest); }
};

template <>
struct Block<uint16_t> {
  Vector lo, mid, hi, largest = set32(0);
  Block(int64_t low, int64_t middle, int64_t high)
      : lo(set16(static_cast<short>(low))),
        mid(set16(static_cast<short>(middle))),
        hi(set16(static_cast<short>(high))) {}
  template <bool kBased>
  Above step(const uint16_t* x, const uint8_t* base, uint8_t* mask, bool stream) {
    Above above{0, 0};
    constexpr int kWidth = sizeof(Vector);
    for (int part = 0; part < 64; part += kWidth) {
      const Vector a = both(load(x + part), set16(0x7fff)), b = both(load(x + part + kWidth / 2), set16(0x7fff));
      largest = larger16(largest, larger16(a, b));
      Vector low = bytes_of(above16(a, lo), above16(b, lo));
      Vector keep = bytes_of(above16(a, mid), above16(b, mid));
      const Vector high = bytes_of(above16(a, hi), above16(b, hi));
      if constexpr (kBased) {
        low = where_nonzero(base + part, low);
        keep = where_nonzero(base + part, keep);
      }
      store_mask(mask + part, keep, stream);
      above.low |= bits_of(low) << part;
      above.high |= bits_of(high) << part;
    }
    return above;
  }
  uint64_t maximum() const { return maximum_of<uint16_t>(largest); }
};

#endif

}  // namespace
}  // namespace pyprune::PYPRUNE_CAPABILITY
