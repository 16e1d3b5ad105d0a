#include "park.h"

#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

// Without branches on the mask, which no processor could foresee. What is kept is written to where the next dropped
// element will be, so the last one ends the loop.
template <class T>
void park_rest(T* weight, const uint8_t* mask, T* parked, int64_t i, int64_t done, int64_t dropped) {
  for (; done < dropped; ++i) {
    parked[done] = weight[i];
    weight[i] = mask[i] != 0 ? weight[i] : T{0};
    done += mask[i] == 0;
  }
}

template <class T>
void unpark_rest(T* weight, const uint8_t* mask, const T* parked, int64_t i, int64_t done, int64_t dropped) {
  for (; done < dropped; ++i) {
    weight[i] = mask[i] != 0 ? weight[i] : parked[done];
    done += mask[i] == 0;
  }
}

// Lanes<T>: so many elements in a register, of which `drops` (a bit for each) are moved to its front or back again.
#if defined(__AVX512BW__)

inline uint32_t dropped_of_16(const uint8_t* mask) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask));
  return _mm_testn_epi8_mask(bytes, bytes);
}

template <class T>
struct Lanes;

template <>
struct Lanes<uint32_t> {
  static constexpr int kWidth = 16;
  static uint32_t dropped(const uint8_t* mask) { return dropped_of_16(mask); }
  static void park(uint32_t* weight, uint32_t* parked, uint32_t drops) {
    const __m512i values = _mm512_loadu_si512(weight);
    _mm512_storeu_si512(parked, _mm512_maskz_compress_epi32(static_cast<__mmask16>(drops), values));
    _mm512_storeu_si512(weight, _mm512_maskz_mov_epi32(static_cast<__mmask16>(~drops), values));
  }
  static void unpark(uint32_t* weight, const uint32_t* parked, uint32_t drops) {
    const __m512i values = _mm512_loadu_si512(weight), back = _mm512_loadu_si512(parked);
    _mm512_storeu_si512(weight, _mm512_mask_expand_epi32(values, static_cast<__mmask16>(drops), back));
  }
};

template <>
struct Lanes<uint64_t> {
  static constexpr int kWidth = 8;
  static uint32_t dropped(const uint8_t* mask) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask));
    return _mm_testn_epi8_mask(bytes, bytes) & 0xff;
  }
  static void park(uint64_t* weight, uint64_t* parked, uint32_t drops) {
    const __m512i values = _mm512_loadu_si512(weight);
    _mm512_storeu_si512(parked, _mm512_maskz_compress_epi64(static_cast<__mmask8>(drops), values));
    _mm512_storeu_si512(weight, _mm512_maskz_mov_epi64(static_cast<__mmask8>(~drops), values));
  }
  static void unpark(uint64_t* weight, const uint64_t* parked, uint32_t drops) {
    const __m512i values = _mm512_loadu_si512(weight), back = _mm512_loadu_si512(parked);
    _mm512_storeu_si512(weight, _mm512_mask_expand_epi64(values, static_cast<__mmask8>(drops), back));
  }
};

// Moved as 32 bits: words of 16 bits have no such instruction in this capability.
template <>
struct Lanes<uint16_t> {
  static constexpr int kWidth = 16;
  static uint32_t dropped(const uint8_t* mask) { return dropped_of_16(mask); }
  static __m512i widened(const void* words) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(words)));
  }
  static void store(void* words, __m512i wide) {
    _mm256_storeu_si256(static_cast<__m256i*>(words), _mm512_cvtepi32_epi16(wide));
  }
  static void park(uint16_t* weight, uint16_t* parked, uint32_t drops) {
    const __m512i values = widened(weight);
    store(parked, _mm512_maskz_compress_epi32(static_cast<__mmask16>(drops), values));
    store(weight, _mm512_maskz_mov_epi32(static_cast<__mmask16>(~drops), values));
  }
  static void unpark(uint16_t* weight, const uint16_t* parked, uint32_t drops) {
    store(weight, _mm512_mask_expand_epi32(widened(weight), static_cast<__mmask16>(drops), widened(parked)));
  }
};

#elif defined(__AVX2__)

// For each set of eight lanes: which lane comes to each place when the set moves to the front, and which place of the
// front each lane of the set comes from when it moves back.
struct Moves {
  uint8_t front[256][8] = {}, back[256][8] = {};
  constexpr Moves() {
    for (int set = 0; set < 256; ++set) {
      int place = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if ((set >> lane & 1) != 0) {
          front[set][place] = static_cast<uint8_t>(lane);
          back[set][lane] = static_cast<uint8_t>(place++);
        }
      }
    }
  }
};
constexpr Moves kMoves;

inline __m256i lanes_of(const uint8_t (&moves)[8]) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(moves)));
}

inline uint32_t dropped_of_8(const uint8_t* mask) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask));
  return _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128())) & 0xff;
}

// All ones in each lane of 32 bits whose byte of the mask is zero.
inline __m256i drops_in_lanes(uint32_t drops) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(drops)), bits), bits);
}

template <class T>
struct Lanes;

template <>
struct Lanes<uint32_t> {
  static constexpr int kWidth = 8;
  static uint32_t dropped(const uint8_t* mask) { return dropped_of_8(mask); }
  static __m256i load(const void* values) { return _mm256_loadu_si256(static_cast<const __m256i*>(values)); }
  static void store(void* to, __m256i values) { _mm256_storeu_si256(static_cast<__m256i*>(to), values); }
  static void park(uint32_t* weight, uint32_t* parked, uint32_t drops) {
    const __m256i values = load(weight);
    store(parked, _mm256_permutevar8x32_epi32(values, lanes_of(kMoves.front[drops])));
    store(weight, _mm256_andnot_si256(drops_in_lanes(drops), values));
  }
  static void unpark(uint32_t* weight, const uint32_t* parked, uint32_t drops) {
    const __m256i back = _mm256_permutevar8x32_epi32(load(parked), lanes_of(kMoves.back[drops]));
    store(weight, _mm256_blendv_epi8(load(weight), back, drops_in_lanes(drops)));
  }
};

template <>
struct Lanes<uint16_t> {
  static constexpr int kWidth = 8;
  static uint32_t dropped(const uint8_t* mask) { return dropped_of_8(mask); }
  static __m256i widened(const void* words) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(words)));
  }
  static void store(void* words, __m256i wide) {
    _mm_storeu_si128(static_cast<__m128i*>(words),
                     _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
  }
  static void park(uint16_t* weight, uint16_t* parked, uint32_t drops) {
    const __m256i values = widened(weight);
    store(parked, _mm256_permutevar8x32_epi32(values, lanes_of(kMoves.front[drops])));
    store(weight, _mm256_andnot_si256(drops_in_lanes(drops), values));
  }
  static void unpark(uint16_t* weight, const uint16_t* parked, uint32_t drops) {
    const __m256i back = _mm256_permutevar8x32_epi32(widened(parked), lanes_of(kMoves.back[drops]));
    store(weight, _mm256_blendv_epi8(widened(weight), back, drops_in_lanes(drops)));
  }
};

#endif

template <class T>
void park_bits(void* weight, const uint8_t* mask, void* parked, int64_t count, int64_t dropped) {
  T *const w = static_cast<T*>(weight), *const out = static_cast<T*>(parked);
  int64_t i = 0, done = 0;
#if defined(__AVX2__)
  if constexpr (requires { Lanes<T>::kWidth; }) {
    // A register is stored as a whole, so the last ones are left to the loop above.
    constexpr int kWidth = Lanes<T>::kWidth;
    for (; i + kWidth <= count && done + kWidth <= dropped; i += kWidth) {
      const uint32_t drops = Lanes<T>::dropped(mask + i);
      Lanes<T>::park(w + i, out + done, drops);
      done += __builtin_popcount(drops);
    }
  }
#endif
  park_rest(w, mask, out, i, done, dropped);
}

template <class T>
void unpark_bits(void* weight, const uint8_t* mask, const void* parked, int64_t count, int64_t dropped) {
  T* const w = static_cast<T*>(weight);
  const T* const from = static_cast<const T*>(parked);
  int64_t i = 0, done = 0;
#if defined(__AVX2__)
  if constexpr (requires { Lanes<T>::kWidth; }) {
    constexpr int kWidth = Lanes<T>::kWidth;
    for (; i + kWidth <= count && done + kWidth <= dropped; i += kWidth) {
      const uint32_t drops = Lanes<T>::dropped(mask + i);
      Lanes<T>::unpark(w + i, from + done, drops);
      done += __builtin_popcount(drops);
    }
  }
#endif
  unpark_rest(w, mask, from, i, done, dropped);
}

}  // namespace

void park_run(void* weight, const uint8_t* mask, void* parked, Dtype dtype, int64_t count, int64_t dropped) {
  switch (item_size(dtype)) {
    case 2: return park_bits<uint16_t>(weight, mask, parked, count, dropped);
    case 4: return park_bits<uint32_t>(weight, mask, parked, count, dropped);
    default: return park_bits<uint64_t>(weight, mask, parked, count, dropped);
  }
}

void unpark_run(void* weight, const uint8_t* mask, const void* parked, Dtype dtype, int64_t count, int64_t dropped) {
  switch (item_size(dtype)) {
    case 2: return unpark_bits<uint16_t>(weight, mask, parked, count, dropped);
    case 4: return unpark_bits<uint32_t>(weight, mask, parked, count, dropped);
    default: return unpark_bits<uint64_t>(weight, mask, parked, count, dropped);
  }
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
