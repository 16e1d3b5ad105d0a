// Ranks in small groups of signed keys: element j stays if fewer than `kept` of its group beat it, that is, have a
// larger key, or the same at a higher place. Keys below zero never stay.
#pragma once

#include <cstdint>
#include <utility>

#include "key_vectors.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

// --- groups side by side: lane l of each of `size` vectors is one group
// ----------------------------------------------

constexpr int64_t kLanes = 64;

// Keys and masks of element j lie at j * kLanes; `lanes` of them are in use, the others are written as well. kSize is
// the size where the compiler shall know it, or 0.
template <class Key, int kSize>
void rank_lanes(const Key* keys, int64_t size, int64_t lanes, int64_t kept, uint8_t* mask) {
  using Vector = typename Lanes<Key>::Vector;
  using Bytes = typename Lanes<Key>::Bytes;
  constexpr int kWidth = Lanes<Key>::kWidth;
  const int64_t count = kSize > 0 ? kSize : size;
  const Vector beats_at_most = Vector{} - static_cast<Key>(kept);  // comparisons give -1
  for (int64_t lane = 0; lane < lanes; lane += kWidth) {
    const auto key = [&](int64_t j) { return *reinterpret_cast<const Vector*>(keys + j * kLanes + lane); };
    for (int64_t j = 0; j < count; ++j) {
      const Vector mine = key(j);
      Vector beats{};
#pragma GCC unroll 8
      for (int64_t i = 0; i < j; ++i) {
        beats += key(i) > mine;
      }
#pragma GCC unroll 8
      for (int64_t i = j + 1; i < count; ++i) {
        beats += key(i) >= mine;
      }
      const Bytes stays = __builtin_convertvector((beats > beats_at_most) & (mine >= 0), Bytes) & 1;
      *reinterpret_cast<Bytes*>(mask + j * kLanes + lane) = stays;
    }
  }
}

// --- groups of 4 and 8 one after the other
// ---------------------------------------------------------------------------

// A vector holds whole groups. SSE2 alone has no instruction that turns 8 halves.
template <class Key, int kSize>
constexpr bool kRanksInRegisters = kSize * sizeof(Key) <= kVectorBytes && (kSize == 4 || kVectorBytes > 16);

#if defined(__AVX512BW__)

// Tables for turning each group of kSize by kTurn: lane j gets element (j + kTurn) % kSize of its group.
template <class Key, int kSize, int kTurn>
struct Turn {
  static constexpr int kWidth = 64 / sizeof(Key);
  alignas(64) Key ties[kWidth];   // 1 where what comes has the higher place, and so wins ties
  alignas(64) uint8_t bytes[64];  // for shuffles of bytes within 16
  alignas(64) Key lanes[kWidth];  // for permutations of lanes
  constexpr Turn() : ties{}, bytes{}, lanes{} {
    for (int lane = 0; lane < kWidth; ++lane) {
      const int from = (lane % kSize + kTurn) % kSize;
      ties[lane] = from > lane % kSize;
      lanes[lane] = static_cast<Key>(lane / kSize * kSize + from);
      for (size_t byte = 0; byte < sizeof(Key); ++byte) {
        bytes[lane * sizeof(Key) + byte] = static_cast<uint8_t>((lanes[lane] * sizeof(Key) + byte) % 16);
      }
    }
  }
};
template <class Key, int kSize, int kTurn>
constexpr Turn<Key, kSize, kTurn> kTurnTable{};

// Bit j: what a turn brings to lane j beats lane j.
template <class Key, int kSize, int kTurn>
uint64_t beaten(__m512i keys) {
  constexpr auto& table = kTurnTable<Key, kSize, kTurn>;
  const __m512i ties = _mm512_load_si512(table.ties);
  __m512i turned;
  if constexpr (kSize * sizeof(Key) <= 16) {
    turned = _mm512_shuffle_epi8(keys, _mm512_load_si512(table.bytes));
  } else if constexpr (sizeof(Key) == 4) {
    turned = _mm512_permutexvar_epi32(_mm512_load_si512(table.lanes), keys);
  } else {
    turned = _mm512_permutexvar_epi64(_mm512_load_si512(table.lanes), keys);
  }
  return above<Key>(turned, less<Key>(keys, ties));
}

// Turns the bits of each group up by kTurn.
template <int kSize, int kTurn>
uint64_t turned_up(uint64_t bits) {
  constexpr uint64_t kGroups = kSize == 4 ? 0x1111111111111111 : 0x0101010101010101;
  constexpr uint64_t kLow = kGroups * ((1 << kTurn) - 1);  // bits that come from the other end
  return (bits << kTurn & ~kLow) | (bits >> (kSize - kTurn) & kLow);
}

// Numbers of three bits, one for each bit of a word.
struct Counts {
  uint64_t ones = 0, twos = 0, fours = 0;
  void add(uint64_t bits) {
    const uint64_t two = ones & bits, four = twos & two;
    ones ^= bits;
    twos ^= two;
    fours ^= four;
  }
  uint64_t below(int64_t limit) const {
    uint64_t less = 0, same = ~uint64_t{0};
    for (const auto& [bits, value] : {std::pair{fours, 4}, {twos, 2}, {ones, 1}}) {
      less |= (limit & value) != 0 ? same & ~bits : 0;
      same &= (limit & value) != 0 ? bits : ~bits;
    }
    return less;
  }
};

// Bits of 64 elements in `keys` that stay.
template <class Key, int kSize>
uint64_t rank64(const __m512i* keys, int64_t kept) {
  constexpr int kParts = sizeof(Key), kWidth = 64 / kParts;
  // Of two turns that meet the same pairs, one tells the other.
  const auto count_turn = [&]<int kTurn>(Counts& counts) {
    uint64_t bits = 0;
    for (int part = 0; part < kParts; ++part) {
      bits |= beaten<Key, kSize, kTurn>(keys[part]) << (part * kWidth);
    }
    counts.add(bits);
    if constexpr (2 * kTurn != kSize) {
      counts.add(~turned_up<kSize, kTurn>(bits));
    }
  };
  Counts counts;
  count_turn.template operator()<1>(counts);
  count_turn.template operator()<2>(counts);
  if constexpr (kSize == 8) {
    count_turn.template operator()<3>(counts);
    count_turn.template operator()<4>(counts);
  }
  return kept == kSize ? ~uint64_t{0} : counts.below(kept);
}

// The largest key is kept in `largest`, if it is larger. `magnitude` is laid over the keys first.
template <class Key, int kSize>
void rank_run(const Key* keys, Key magnitude, int64_t count, int64_t kept, uint8_t* mask, Key& largest) {
  constexpr int kParts = sizeof(Key), kWidth = 64 / kParts;
  const __m512i magnitudes = all_lanes(magnitude);
  __m512i top = all_lanes(largest);
  const auto step = [&](const Key* from) {
    __m512i v[kParts];
    uint64_t dropped = 0;
    for (int part = 0; part < kParts; ++part) {
      v[part] = _mm512_and_si512(_mm512_loadu_si512(from + part * kWidth), magnitudes);
      top = larger<Key>(top, v[part]);
    }
    if (magnitude < 0) {  // otherwise no key is below zero
      for (int part = 0; part < kParts; ++part) {
        dropped |= above<Key>(_mm512_setzero_si512(), v[part]) << (part * kWidth);
      }
    }
    return rank64<Key, kSize>(v, kept) & ~dropped;
  };
  // A mask is read again long after it has left the cache: streaming saves reading its lines first.
  const bool stream = reinterpret_cast<uintptr_t>(mask) % 64 == 0 && count >= kLanes * 8;
  int64_t done = 0;
  for (; done + 64 <= count; done += 64) {
    store_mask(mask + done, step(keys + done), stream);
  }
  if (done < count) {
    alignas(64) Key rest[64] = {};
    __builtin_memcpy(rest, keys + done, (count - done) * sizeof(Key));
    const __m512i bytes = _mm512_maskz_set1_epi8(step(rest), 1);
    _mm512_mask_storeu_epi8(mask + done, (uint64_t{1} << (count - done)) - 1, bytes);
  }
  if (stream) {
    _mm_sfence();
  }
  alignas(64) Key tops[kWidth];
  _mm512_store_si512(tops, top);
  for (const Key one : tops) {
    largest = one > largest ? one : largest;
  }
}

#else

// Of the groups of kSize in a vector: -1 for what stays, 0 for what goes.
template <class Key, int kSize>
auto rank_vector(typename Lanes<Key>::Vector keys, Key kept) {
  using Vector = typename Lanes<Key>::Vector;
  const auto count_turn = [&]<int kTurn>(Vector& beats) {
    Vector from{}, back{}, ties{};
    for (int lane = 0; lane < Lanes<Key>::kWidth; ++lane) {
      const int place = lane % kSize, group = lane - place;
      from[lane] = static_cast<Key>(group + (place + kTurn) % kSize);
      back[lane] = static_cast<Key>(group + (place + kSize - kTurn) % kSize);
      ties[lane] = place + kTurn < kSize;  // what comes has the higher place, and wins
    }
    const Vector beaten = __builtin_shuffle(keys, from) > keys - ties;
    beats += beaten;
    if constexpr (2 * kTurn != kSize) {
      beats += ~__builtin_shuffle(beaten, back);
    }
  };
  Vector beats{};
  count_turn.template operator()<1>(beats);
  count_turn.template operator()<2>(beats);
  if constexpr (kSize == 8) {
    count_turn.template operator()<3>(beats);
    count_turn.template operator()<4>(beats);
  }
  const Vector beats_at_most = Vector{} - kept;
  return (beats > beats_at_most) & (keys >= 0);
}

template <class Key, int kSize>
void rank_run(const Key* keys, Key magnitude, int64_t count, int64_t kept, uint8_t* mask, Key& largest) {
  using Vector = typename Lanes<Key>::Vector;
  using Bytes = typename Lanes<Key>::Bytes;
  constexpr int kWidth = Lanes<Key>::kWidth;
  Vector top{};
  const auto step = [&](const Key* from) {
    const Vector v = Lanes<Key>::load(from) & magnitude;
    top = v > top ? v : top;
    return __builtin_convertvector(rank_vector<Key, kSize>(v, static_cast<Key>(kept)), Bytes) & 1;
  };
  int64_t done = 0;
  for (; done + kWidth <= count; done += kWidth) {
    const Bytes bytes = step(keys + done);
    __builtin_memcpy(mask + done, &bytes, sizeof(bytes));
  }
  if (done < count) {
    Key rest[kWidth] = {};
    __builtin_memcpy(rest, keys + done, (count - done) * sizeof(Key));
    const Bytes bytes = step(rest);
    __builtin_memcpy(mask + done, &bytes, count - done);
  }
  for (int lane = 0; lane < kWidth; ++lane) {
    largest = top[lane] > largest ? top[lane] : largest;
  }
}
#endif

}  // namespace
}  // namespace pyprune::PYPRUNE_CAPABILITY
