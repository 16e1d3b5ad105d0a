#include "pack.h"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

// Bits of 64 elements that are not zero.
template <class T>
uint64_t bits_of_64(const T* data, T significant) {
  uint64_t bits = 0;
#if defined(__AVX512BW__)
  constexpr int kWidth = 64 / sizeof(T);
  __m512i wanted;
  if constexpr (sizeof(T) == 1) wanted = _mm512_set1_epi8(static_cast<char>(significant));
  if constexpr (sizeof(T) == 2) wanted = _mm512_set1_epi16(static_cast<int16_t>(significant));
  if constexpr (sizeof(T) == 4) wanted = _mm512_set1_epi32(static_cast<int32_t>(significant));
  if constexpr (sizeof(T) == 8) wanted = _mm512_set1_epi64(static_cast<int64_t>(significant));
  for (int i = 0; i < 64; i += kWidth) {
    const __m512i x = _mm512_loadu_si512(data + i);
    if constexpr (sizeof(T) == 1) bits |= static_cast<uint64_t>(_mm512_test_epi8_mask(x, wanted));
    if constexpr (sizeof(T) == 2) bits |= static_cast<uint64_t>(_mm512_test_epi16_mask(x, wanted)) << i;
    if constexpr (sizeof(T) == 4) bits |= static_cast<uint64_t>(_mm512_test_epi32_mask(x, wanted)) << i;
    if constexpr (sizeof(T) == 8) bits |= static_cast<uint64_t>(_mm512_test_epi64_mask(x, wanted)) << i;
  }
#elif defined(__AVX2__)
  const __m256i zero = _mm256_setzero_si256();
  const auto load = [&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i)); };
  // Zeros are all ones in what is compared, so bits are of zeros until the end.
  if constexpr (sizeof(T) == 1) {
    const __m256i wanted = _mm256_set1_epi8(static_cast<char>(significant));
    for (int i = 0; i < 64; i += 32) {
      const __m256i zeros = _mm256_cmpeq_epi8(_mm256_and_si256(load(i), wanted), zero);
      bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(zeros))) << i;
    }
  } else if constexpr (sizeof(T) == 2) {
    const __m256i wanted = _mm256_set1_epi16(static_cast<int16_t>(significant));
    for (int i = 0; i < 64; i += 32) {
      const __m256i low = _mm256_cmpeq_epi16(_mm256_and_si256(load(i), wanted), zero);
      const __m256i high = _mm256_cmpeq_epi16(_mm256_and_si256(load(i + 16), wanted), zero);
      const __m256i zeros = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);
      bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(zeros))) << i;
    }
  } else if constexpr (sizeof(T) == 4) {
    const __m256i wanted = _mm256_set1_epi32(static_cast<int32_t>(significant));
    for (int i = 0; i < 64; i += 8) {
      const __m256i zeros = _mm256_cmpeq_epi32(_mm256_and_si256(load(i), wanted), zero);
      bits |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(zeros))) << i;
    }
  } else {
    const __m256i wanted = _mm256_set1_epi64x(static_cast<int64_t>(significant));
    for (int i = 0; i < 64; i += 4) {
      const __m256i zeros = _mm256_cmpeq_epi64(_mm256_and_si256(load(i), wanted), zero);
      bits |= static_cast<uint64_t>(_mm256_movemask_pd(_mm256_castsi256_pd(zeros))) << i;
    }
  }
  bits = ~bits;
#else
  for (int i = 0; i < 64; ++i) {
    bits |= static_cast<uint64_t>((data[i] & significant) != 0) << i;
  }
#endif
  return bits;
}

template <class T>
int64_t pack_bits_of(const T* data, T significant, uint8_t* bits, int64_t count) {
  int64_t kept = 0, i = 0;
  for (; i + 64 <= count; i += 64) {
    const uint64_t word = bits_of_64(data + i, significant);
    std::memcpy(bits + i / 8, &word, 8);
    kept += __builtin_popcountll(word);
  }
  for (; i < count; i += 8) {
    unsigned byte = 0;
    for (int64_t bit = 0; bit < 8 && i + bit < count; ++bit) {
      byte |= static_cast<unsigned>((data[i + bit] & significant) != 0) << bit;
    }
    bits[i / 8] = static_cast<uint8_t>(byte);
    kept += __builtin_popcount(byte);
  }
  return kept;
}

inline int64_t bit_at(const uint8_t* bits, int64_t i) {
  return bits[i / 8] >> (i % 8) & 1;
}

// Without branches on the bits, which no processor could foresee. What is dropped is written to where the next kept
// element will be, so the last one ends the loop.
template <class T>
void pack_rest(const T* data, const uint8_t* bits, T* values, int64_t i, int64_t done, int64_t kept) {
  for (; done < kept; ++i) {
    values[done] = data[i];
    done += bit_at(bits, i);
  }
}

template <class T>
void unpack_rest(const uint8_t* bits, const T* values, T* out, int64_t i, int64_t done, int64_t count, int64_t kept) {
  for (; done < kept; ++i) {
    const int64_t bit = bit_at(bits, i);
    out[i] = static_cast<T>(values[done] & static_cast<T>(-bit));
    done += bit;
  }
  std::fill(out + i, out + count, T{0});
}

#if defined(__AVX2__)

// Store a register; kStream: past the caches, where `to` is a multiple of its size.
template <bool kStream>
inline void store(void* to, __m128i x) {
  kStream ? _mm_stream_si128(static_cast<__m128i*>(to), x) : _mm_storeu_si128(static_cast<__m128i*>(to), x);
}

template <bool kStream>
inline void store(void* to, __m256i x) {
  kStream ? _mm256_stream_si256(static_cast<__m256i*>(to), x) : _mm256_storeu_si256(static_cast<__m256i*>(to), x);
}

#endif

// Lanes<T>: so many elements in a register, of which those of a set (a bit for each) are moved to its front, or come
// from there while the others become 0.
template <class T>
struct Lanes {};

#if defined(__AVX512BW__)

template <bool kStream>
inline void store(void* to, __m512i x) {
  kStream ? _mm512_stream_si512(static_cast<__m512i*>(to), x) : _mm512_storeu_si512(to, x);
}

template <>
struct Lanes<uint32_t> {
  static constexpr int kWidth = 16;
  static void pack(const uint32_t* data, uint32_t* values, uint64_t set) {
    _mm512_storeu_si512(values, _mm512_maskz_compress_epi32(static_cast<__mmask16>(set), _mm512_loadu_si512(data)));
  }
  template <bool kStream>
  static void unpack(const uint32_t* values, uint32_t* out, uint64_t set) {
    store<kStream>(out, _mm512_maskz_expand_epi32(static_cast<__mmask16>(set), _mm512_loadu_si512(values)));
  }
};

template <>
struct Lanes<uint64_t> {
  static constexpr int kWidth = 8;
  static void pack(const uint64_t* data, uint64_t* values, uint64_t set) {
    _mm512_storeu_si512(values, _mm512_maskz_compress_epi64(static_cast<__mmask8>(set), _mm512_loadu_si512(data)));
  }
  template <bool kStream>
  static void unpack(const uint64_t* values, uint64_t* out, uint64_t set) {
    store<kStream>(out, _mm512_maskz_expand_epi64(static_cast<__mmask8>(set), _mm512_loadu_si512(values)));
  }
};

// Moved as 32 bits: smaller ones have no such instruction in this capability, but only in VBMI2 (below).
template <>
struct Lanes<uint16_t> {
  static constexpr int kWidth = 16;
  static __m512i widened(const void* words) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(words)));
  }
  static void pack(const uint16_t* data, uint16_t* values, uint64_t set) {
    const __m512i front = _mm512_maskz_compress_epi32(static_cast<__mmask16>(set), widened(data));
    store<false>(values, _mm512_cvtepi32_epi16(front));
  }
  template <bool kStream>
  static void unpack(const uint16_t* values, uint16_t* out, uint64_t set) {
    const __m512i back = _mm512_maskz_expand_epi32(static_cast<__mmask16>(set), widened(values));
    store<kStream>(out, _mm512_cvtepi32_epi16(back));
  }
};

template <>
struct Lanes<uint8_t> {
  static constexpr int kWidth = 16;
  static __m512i widened(const void* bytes) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(bytes)));
  }
  static void pack(const uint8_t* data, uint8_t* values, uint64_t set) {
    const __m512i front = _mm512_maskz_compress_epi32(static_cast<__mmask16>(set), widened(data));
    store<false>(values, _mm512_cvtepi32_epi8(front));
  }
  template <bool kStream>
  static void unpack(const uint8_t* values, uint8_t* out, uint64_t set) {
    const __m512i back = _mm512_maskz_expand_epi32(static_cast<__mmask16>(set), widened(values));
    store<kStream>(out, _mm512_cvtepi32_epi8(back));
  }
};

#elif defined(__AVX2__)

// For each set of eight lanes: which lane comes to each place when the set moves to the front, and which place of the
// front each lane of the set comes from when it moves back; 0x80, which shuffles read as zero, for all others.
struct Moves {
  uint8_t front[256][8], back[256][8];
  constexpr Moves() : front(), back() {
    for (int set = 0; set < 256; ++set) {
      int place = 0;
      for (int lane = 0; lane < 8; ++lane) {
        front[set][lane] = back[set][lane] = 0x80;
      }
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

inline __m128i moves_of(const uint8_t (&moves)[8]) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(moves));
}

template <>
struct Lanes<uint8_t> {
  static constexpr int kWidth = 8;
  static void move(const uint8_t* from, uint8_t* to, const uint8_t (&moves)[8]) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(bytes, moves_of(moves)));
  }
  static void pack(const uint8_t* data, uint8_t* values, uint64_t set) { move(data, values, kMoves.front[set]); }
  template <bool>
  static void unpack(const uint8_t* values, uint8_t* out, uint64_t set) {
    move(values, out, kMoves.back[set]);
  }
};

template <>
struct Lanes<uint16_t> {
  static constexpr int kWidth = 8;
  template <bool kStream>
  static void move(const uint16_t* from, uint16_t* to, const uint8_t (&moves)[8]) {
    // Lane k is bytes 2k and 2k + 1. What is 0x80 keeps its upper bit, because both bytes are added to themselves.
    const __m128i lanes = moves_of(moves), twice = _mm_unpacklo_epi8(lanes, lanes);
    const __m128i low = _mm_and_si128(_mm_slli_epi16(twice, 1), _mm_set1_epi16(0x0e0e));
    const __m128i none = _mm_and_si128(twice, _mm_set1_epi16(static_cast<int16_t>(0x8080)));
    const __m128i bytes = _mm_or_si128(_mm_or_si128(low, none), _mm_set1_epi16(0x0100));
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    store<kStream>(to, _mm_shuffle_epi8(words, bytes));
  }
  static void pack(const uint16_t* data, uint16_t* values, uint64_t set) {
    move<false>(data, values, kMoves.front[set]);
  }
  template <bool kStream>
  static void unpack(const uint16_t* values, uint16_t* out, uint64_t set) {
    move<kStream>(values, out, kMoves.back[set]);
  }
};

template <>
struct Lanes<uint32_t> {
  static constexpr int kWidth = 8;
  // The permutation takes the lowest three bits of each lane; the sign says that it is to be zero.
  template <bool kStream>
  static void move(const uint32_t* from, uint32_t* to, const uint8_t (&moves)[8]) {
    const __m256i lanes = _mm256_cvtepi8_epi32(moves_of(moves));
    const __m256i moved =
        _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), lanes);
    store<kStream>(to, _mm256_andnot_si256(_mm256_srai_epi32(lanes, 31), moved));
  }
  static void pack(const uint32_t* data, uint32_t* values, uint64_t set) {
    move<false>(data, values, kMoves.front[set]);
  }
  template <bool kStream>
  static void unpack(const uint32_t* values, uint32_t* out, uint64_t set) {
    move<kStream>(values, out, kMoves.back[set]);
  }
};

#endif

// The bits of a register of elements.
template <int kWidth>
inline uint64_t set_at(const uint8_t* bits, int64_t i) {
  if constexpr (kWidth == 16) {
    uint16_t set;
    std::memcpy(&set, bits + i / 8, 2);
    return set;
  }
  return bits[i / 8];
}

#if defined(__AVX512BW__)

// 64 bytes at a time, for processors of this capability that also have VBMI2 (all but the first ones). Loops of their
// own, because what is compiled for more than its caller cannot be a part of it. Return where they ended.
#define PYPRUNE_VBMI2 __attribute__((target("avx512vbmi2")))

inline bool has_vbmi2() {
  static const bool has = __builtin_cpu_supports("avx512vbmi2") != 0;
  return has;
}

template <class T>
uint64_t wide_set(const uint8_t* bits, int64_t i) {
  uint64_t set = 0;
  std::memcpy(&set, bits + i / 8, 8 / sizeof(T));
  return set;
}

template <class T>
PYPRUNE_VBMI2 int64_t pack_wide(const T* data, const uint8_t* bits, T* values, int64_t count, int64_t kept,
                                int64_t& done) {
  constexpr int kWidth = 64 / sizeof(T);
  int64_t i = 0;
  for (; i + kWidth <= count && done + kWidth <= kept; i += kWidth) {
    const uint64_t set = wide_set<T>(bits, i);
    const __m512i x = _mm512_loadu_si512(data + i);
    if constexpr (sizeof(T) == 1) {
      _mm512_storeu_si512(values + done, _mm512_maskz_compress_epi8(set, x));
    } else {
      _mm512_storeu_si512(values + done, _mm512_maskz_compress_epi16(static_cast<__mmask32>(set), x));
    }
    done += __builtin_popcountll(set);
  }
  return i;
}

template <bool kStream, class T>
PYPRUNE_VBMI2 int64_t unpack_wide(const uint8_t* bits, const T* values, T* out, int64_t count, int64_t kept,
                                  int64_t& done) {
  constexpr int kWidth = 64 / sizeof(T);
  int64_t i = 0;
  for (; i + kWidth <= count && done + kWidth <= kept; i += kWidth) {
    const uint64_t set = wide_set<T>(bits, i);
    const __m512i x = _mm512_loadu_si512(values + done);
    if constexpr (sizeof(T) == 1) {
      store<kStream>(out + i, _mm512_maskz_expand_epi8(set, x));
    } else {
      store<kStream>(out + i, _mm512_maskz_expand_epi16(static_cast<__mmask32>(set), x));
    }
    done += __builtin_popcountll(set);
  }
  return i;
}

#endif

template <class T>
void pack_values_of(const T* data, const uint8_t* bits, T* values, int64_t count, int64_t kept) {
  int64_t i = 0, done = 0;
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) <= 2) {
    if (has_vbmi2()) i = pack_wide(data, bits, values, count, kept, done);
  }
#endif
  if constexpr (requires { Lanes<T>::kWidth; }) {
    // A register is stored as a whole, so the last ones are left to the loop above.
    constexpr int kWidth = Lanes<T>::kWidth;
    for (; i + kWidth <= count && done + kWidth <= kept; i += kWidth) {
      const uint64_t set = set_at<kWidth>(bits, i);
      Lanes<T>::pack(data + i, values + done, set);
      done += __builtin_popcountll(set);
    }
  }
  pack_rest(data, bits, values, i, done, kept);
}

template <bool kStream, class T>
void unpack_values_of(const uint8_t* bits, const T* values, T* out, int64_t count, int64_t kept) {
  int64_t i = 0, done = 0;
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) <= 2) {
    if (has_vbmi2()) i = unpack_wide<kStream>(bits, values, out, count, kept, done);
  }
#endif
  if constexpr (requires { Lanes<T>::kWidth; }) {
    constexpr int kWidth = Lanes<T>::kWidth;
    for (; i + kWidth <= count && done + kWidth <= kept; i += kWidth) {
      const uint64_t set = set_at<kWidth>(bits, i);
      Lanes<T>::template unpack<kStream>(values + done, out + i, set);
      done += __builtin_popcountll(set);
    }
  }
  unpack_rest(bits, values, out, i, done, count, kept);
#if defined(__AVX2__)
  if (kStream) _mm_sfence();  // other threads are told by ordinary stores
#endif
}

template <class Use>
auto with_bits_of(int64_t size, const Use& use) {
  switch (size) {
    case 1: return use(uint8_t{});
    case 2: return use(uint16_t{});
    case 4: return use(uint32_t{});
    default: return use(uint64_t{});
  }
}

}  // namespace

int64_t pack_bits(const void* data, int64_t size, uint64_t significant, uint8_t* bits, int64_t count) {
  return with_bits_of(size, [&](auto zero) {
    using T = decltype(zero);
    return pack_bits_of(static_cast<const T*>(data), static_cast<T>(significant), bits, count);
  });
}

int64_t count_bits(const uint8_t* bits, int64_t bytes) {
  int64_t set = 0, i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, bits + i, 8);
    set += __builtin_popcountll(word);
  }
  for (; i < bytes; ++i) {
    set += __builtin_popcount(bits[i]);
  }
  return set;
}

void pack_values(const void* data, int64_t size, const uint8_t* bits, void* values, int64_t count, int64_t kept) {
  with_bits_of(size, [&](auto zero) {
    using T = decltype(zero);
    pack_values_of(static_cast<const T*>(data), bits, static_cast<T*>(values), count, kept);
  });
}

void unpack_values(const uint8_t* bits, const void* values, int64_t size, void* out, int64_t count, int64_t kept,
                   bool past_caches) {
  const bool stream = past_caches && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  with_bits_of(size, [&](auto zero) {
    using T = decltype(zero);
    const auto run = stream ? unpack_values_of<true, T> : unpack_values_of<false, T>;
    run(bits, static_cast<const T*>(values), static_cast<T*>(out), count, kept);
  });
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
