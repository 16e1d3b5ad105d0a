#include "crc32.h"

#include <cstring>

#include "../crc32_polynomial.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

// after[k][byte]: the state that a byte leaves k bytes later.
struct Tables {
  uint32_t after[8][256];
  constexpr Tables() : after() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      after[0][byte] = byte;
      for (int bit = 0; bit < 8; ++bit) {
        after[0][byte] = crc32_times_x(after[0][byte]);
      }
    }
    for (int k = 1; k < 8; ++k) {
      for (int byte = 0; byte < 256; ++byte) {
        after[k][byte] = (after[k - 1][byte] >> 8) ^ after[0][after[k - 1][byte] & 0xff];
      }
    }
  }
};
constexpr Tables kTables;

uint32_t by_tables(const uint8_t* data, int64_t bytes, uint32_t state) {
  const auto& after = kTables.after;
  for (; bytes >= 8; bytes -= 8, data += 8) {
    uint32_t word = state;
    for (int k = 0; k < 4; ++k) {
      word ^= static_cast<uint32_t>(data[k]) << (8 * k);
    }
    state = after[7][word & 0xff] ^ after[6][word >> 8 & 0xff] ^ after[5][word >> 16 & 0xff] ^ after[4][word >> 24] ^
            after[3][data[4]] ^ after[2][data[5]] ^ after[1][data[6]] ^ after[0][data[7]];
  }
  for (; bytes > 0; --bytes, ++data) {
    state = (state >> 8) ^ after[0][(state ^ *data) & 0xff];
  }
  return state;
}

#if defined(__AVX2__)

// What 16 bytes are multiplied with to be moved so many bytes ahead: their first half, and their second. Products of
// polynomials with reversed bits come out one bit too low.
template <int kBytes, int kHalf>
constexpr uint64_t kAhead = uint64_t{crc32_power(8 * kBytes + (kHalf == 0 ? 32 : -32))} << 1;

template <int kBytes>
inline __m128i factors() {
  return _mm_set_epi64x(kAhead<kBytes, 1>, kAhead<kBytes, 0>);
}

// Loops of their own, because what is compiled for more than its caller cannot be a part of it (and no lambdas).
#define PYPRUNE_PCLMUL __attribute__((target("pclmul")))

PYPRUNE_PCLMUL inline __m128i folded(__m128i a, __m128i factors, __m128i b) {
  const __m128i low = _mm_clmulepi64_si128(a, factors, 0x00), high = _mm_clmulepi64_si128(a, factors, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), b);
}

PYPRUNE_PCLMUL inline __m128i block_at(const uint8_t* data) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

// 16 bytes with the same remainder as those at `data`, which are a multiple of 64, at least as many.
PYPRUNE_PCLMUL __m128i fold_64(const uint8_t* data, int64_t bytes, uint32_t state) {
  __m128i lanes[4];
  for (int lane = 0; lane < 4; ++lane) {
    lanes[lane] = block_at(data + 16 * lane);
  }
  lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(static_cast<int>(state)));
  const __m128i far = factors<64>(), near = factors<16>();
  for (int64_t i = 64; i < bytes; i += 64) {
    for (int lane = 0; lane < 4; ++lane) {
      lanes[lane] = folded(lanes[lane], far, block_at(data + i + 16 * lane));
    }
  }
  for (int lane = 1; lane < 4; ++lane) {
    lanes[0] = folded(lanes[0], near, lanes[lane]);
  }
  return lanes[0];
}

inline bool has_pclmul() {
  static const bool has = __builtin_cpu_supports("pclmul") != 0;
  return has;
}

#endif

#if defined(__AVX512BW__)

#define PYPRUNE_VPCLMUL __attribute__((target("pclmul,vpclmulqdq")))

PYPRUNE_VPCLMUL inline __m512i folded(__m512i a, __m512i factors, __m512i b) {
  const __m512i low = _mm512_clmulepi64_epi128(a, factors, 0x00), high = _mm512_clmulepi64_epi128(a, factors, 0x11);
  return _mm512_ternarylogic_epi64(low, high, b, 0x96);
}

// The same of a multiple of 256 bytes.
PYPRUNE_VPCLMUL __m128i fold_256(const uint8_t* data, int64_t bytes, uint32_t state) {
  __m512i lanes[4];
  for (int lane = 0; lane < 4; ++lane) {
    lanes[lane] = _mm512_loadu_si512(data + 64 * lane);
  }
  const __m128i first = _mm_cvtsi32_si128(static_cast<int>(state));
  lanes[0] = _mm512_xor_si512(lanes[0], _mm512_zextsi128_si512(first));
  const __m512i far = _mm512_broadcast_i32x4(factors<256>()), near = _mm512_broadcast_i32x4(factors<64>());
  for (int64_t i = 256; i < bytes; i += 256) {
    for (int lane = 0; lane < 4; ++lane) {
      lanes[lane] = folded(lanes[lane], far, _mm512_loadu_si512(data + i + 64 * lane));
    }
  }
  for (int lane = 1; lane < 4; ++lane) {
    lanes[0] = folded(lanes[0], near, lanes[lane]);
  }
  const __m128i last = factors<16>();
  __m128i block = folded(_mm512_castsi512_si128(lanes[0]), last, _mm512_extracti32x4_epi32(lanes[0], 1));
  block = folded(block, last, _mm512_extracti32x4_epi32(lanes[0], 2));
  return folded(block, last, _mm512_extracti32x4_epi32(lanes[0], 3));
}

inline bool has_vpclmul() {
  static const bool has = has_pclmul() && __builtin_cpu_supports("vpclmulqdq") != 0;
  return has;
}

#endif

}  // namespace

uint32_t crc32_of(const uint8_t* data, int64_t bytes, uint32_t state) {
#if defined(__AVX2__)
  alignas(16) uint8_t block[16];
  const auto take = [&](int64_t some, __m128i folded_block) {
    _mm_store_si128(reinterpret_cast<__m128i*>(block), folded_block);
    state = by_tables(block, 16, 0);
    data += some;
    bytes -= some;
  };
#if defined(__AVX512BW__)
  if (bytes >= 256 && has_vpclmul()) take(bytes / 256 * 256, fold_256(data, bytes / 256 * 256, state));
#endif
  if (bytes >= 64 && has_pclmul()) take(bytes / 64 * 64, fold_64(data, bytes / 64 * 64, state));
#endif
  return by_tables(data, bytes, state);
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
