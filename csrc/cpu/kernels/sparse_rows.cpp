#include "sparse_rows.h"

#include "list_pieces.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

// --- bitmask: values go to their columns
// ---------------------------------------------------------------------------- expand<type>(values, bits): lane i has
// the next of the values if bit i is set, else 0.

#if defined(__AVX512F__)

#define PYPRUNE_EXPANDS
constexpr bool kExpands = true;
using Bits = uint16_t;

template <SparseValue kType>
inline Floats expand(const void* values, int64_t first, Bits bits) {
  const __mmask16 set = bits;
  if constexpr (kType == SparseValue::kFloat32) {
    __m512 some = _mm512_loadu_ps(static_cast<const float*>(values) + first);
    asm("" : "+v"(some));  // with a load in it, the instruction takes several times as long on Zen 4 and 5
    return reinterpret_cast<Floats>(_mm512_maskz_expand_ps(set, some));
  } else if constexpr (kType == SparseValue::kInt8) {
    const __m128i bytes =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const int8_t*>(values) + first));
    return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(_mm512_maskz_expand_epi32(set, _mm512_cvtepi8_epi32(bytes))));
  } else {
    const __m256i words =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(values) + first));
    if constexpr (kType == SparseValue::kFloat16) {
      return reinterpret_cast<Floats>(_mm512_maskz_expand_ps(set, _mm512_cvtph_ps(words)));
    }
    return reinterpret_cast<Floats>(
        _mm512_maskz_expand_epi32(set, _mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16)));
  }
}

#elif defined(__AVX2__)

#define PYPRUNE_EXPANDS
constexpr bool kExpands = true;
using Bits = uint8_t;

// For each byte of a mask which value comes to which of eight places; -1: none.
struct Places {
  constexpr Places() : bytes(), words() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int bit = 0, next = 0; bit < 8; ++bit) {
        const int from = (mask >> bit & 1) != 0 ? next++ : -1;
        bytes[mask][bit] = static_cast<int8_t>(from);
        words[mask][2 * bit] = static_cast<int8_t>(from < 0 ? -1 : 2 * from);
        words[mask][2 * bit + 1] = static_cast<int8_t>(from < 0 ? -1 : 2 * from + 1);
      }
    }
  }
  alignas(16) int8_t bytes[256][8];
  alignas(16) int8_t words[256][16];
};
constexpr Places kPlaces;

template <SparseValue kType>
inline Floats expand(const void* values, int64_t first, Bits bits) {
  const auto eight = [](const void* at) { return _mm_loadl_epi64(static_cast<const __m128i*>(at)); };
  if constexpr (kType == SparseValue::kFloat32) {
    const __m256i from = _mm256_cvtepi8_epi32(eight(kPlaces.bytes[bits]));
    const __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps(static_cast<const float*>(values) + first), from);
    return reinterpret_cast<Floats>(_mm256_blendv_ps(moved, _mm256_setzero_ps(), _mm256_castsi256_ps(from)));
  } else if constexpr (kType == SparseValue::kInt8) {
    const __m128i moved =
        _mm_shuffle_epi8(eight(static_cast<const int8_t*>(values) + first), eight(kPlaces.bytes[bits]));
    return reinterpret_cast<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(moved)));
  } else {
    const __m128i words =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(values) + first));
    const __m128i moved =
        _mm_shuffle_epi8(words, _mm_load_si128(reinterpret_cast<const __m128i*>(kPlaces.words[bits])));
    if constexpr (kType == SparseValue::kFloat16) {
      return reinterpret_cast<Floats>(_mm256_cvtph_ps(moved));
    }
    return reinterpret_cast<Floats>(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(moved), 16)));
  }
}

#else

constexpr bool kExpands = false;

#endif

inline float sum_of(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x));
#elif defined(__AVX2__)
  const __m256 all = reinterpret_cast<__m256>(x);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

#if defined(PYPRUNE_EXPANDS)

template <SparseValue kType, int64_t kRows>
void expand_lists(const SparseLists& lists, const RowPanel& panel, float* sums, int64_t sums_step) {
  constexpr int64_t kSets = kRows == 1 ? 4 : kRows <= 3 ? 2 : 1, kBits = 8 * sizeof(Bits);
  static_assert(kBits == kWidth);
  const int64_t first = lists.list();
  for (int64_t i = 0; i < lists.groups; ++i) {
    int64_t next = std::min<int64_t>(static_cast<uint32_t>(lists.offsets[first + i]), lists.entries);
    Bits masks[kMaskWidth / kBits];
    std::memcpy(masks, lists.index + (first + i) * kMaskBytes, sizeof(masks));
    Floats sum[kRows][kSets] = {};
    for (int64_t part = 0; part < kMaskWidth / kBits; part += kSets) {
#pragma GCC unroll 4
      for (int64_t set = 0; set < kSets; ++set) {
        const Bits bits = masks[part + set];
        const Floats value = expand<kType>(lists.values, next, bits);
        next += __builtin_popcount(bits);
#pragma GCC unroll 8
        for (int64_t row = 0; row < kRows; ++row) {
          const Floats x = load(panel.activations + row * panel.row_step + (part + set) * kWidth);
#if defined(__AVX512F__)
          sum[row][set] = reinterpret_cast<Floats>(
              _mm512_mask3_fmadd_ps(reinterpret_cast<__m512>(value), reinterpret_cast<__m512>(x),
                                    reinterpret_cast<__m512>(sum[row][set]), bits));
#else
          sum[row][set] = multiply_add(value, x, sum[row][set]);
#endif
        }
      }
    }
#pragma GCC unroll 8
    for (int64_t row = 0; row < kRows; ++row) {
      Floats all = sum[row][0];
      if constexpr (kSets >= 2) all = all + sum[row][1];
      if constexpr (kSets == 4) all = all + (sum[row][2] + sum[row][3]);
      sums[row * sums_step + i] += sum_of(all);
    }
  }
}

template <SparseValue kType>
void expand_lists(const SparseLists& lists, const RowPanel& panel, float* sums, int64_t sums_step) {
  switch (panel.rows) {
    case 1: return expand_lists<kType, 1>(lists, panel, sums, sums_step);
    case 2: return expand_lists<kType, 2>(lists, panel, sums, sums_step);
    case 3: return expand_lists<kType, 3>(lists, panel, sums, sums_step);
    case 4: return expand_lists<kType, 4>(lists, panel, sums, sums_step);
    case 5: return expand_lists<kType, 5>(lists, panel, sums, sums_step);
    case 6: return expand_lists<kType, 6>(lists, panel, sums, sums_step);
    case 7: return expand_lists<kType, 7>(lists, panel, sums, sums_step);
    default: return expand_lists<kType, 8>(lists, panel, sums, sums_step);
  }
}

#endif

// --- the others: activations go to their values
// ---------------------------------------------------------------------

template <SparseLayout kLayout>
void add_row(const SparseLists& lists, const float* x, float* sums) {
  PieceRoom room;
  const int64_t first = lists.list();
  for (int64_t list = first; list < first + lists.groups; ++list) {
    pieces<kLayout>(lists, list, room, [&](const float* values, const auto* columns, int64_t count) {
      if constexpr (kLayout == SparseLayout::kBlock4) {
        Four sum[4] = {}, all;
        const auto add = [&](int64_t i, int64_t set) {
          Four four;
          std::memcpy(&four, values + 4 * i, sizeof(four));
          sum[set] = multiply_add(four, x[columns[i]], sum[set]);
        };
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) {
          add(i, 0), add(i + 1, 1), add(i + 2, 2), add(i + 3, 3);
        }
        for (; i < count; ++i) {
          add(i, 0);
        }
        std::memcpy(&all, sums, sizeof(all));
        all += (sum[0] + sum[1]) + (sum[2] + sum[3]);
        std::memcpy(sums, &all, sizeof(all));
      } else {
        float sum[4] = {};
        for (int64_t i = 0; i < count; i += 4) {
          for (int64_t k = 0; k < 4; ++k) {
            sum[k] = multiply_add(values[i + k], x[columns[i + k]], sum[k]);
          }
        }
        *sums += (sum[0] + sum[1]) + (sum[2] + sum[3]);
      }
    });
    sums += kLayout == SparseLayout::kBlock4 ? 4 : 1;
  }
}

#if defined(__AVX512F__)

// So many values as float, whatever is behind them.
template <SparseValue kType>
inline __m512 sixteen(const void* values, int64_t first) {
  if constexpr (kType == SparseValue::kFloat32) {
    return _mm512_loadu_ps(static_cast<const float*>(values) + first);
  } else if constexpr (kType == SparseValue::kInt8) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const int8_t*>(values) + first))));
  } else {
    const __m256i words =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(values) + first));
    if constexpr (kType == SparseValue::kFloat16) {
      return _mm512_cvtph_ps(words);
    }
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
  }
}

// x[column] for 16 columns of a block of at most kVectors vectors, which lies in registers.
template <int64_t kVectors>
inline __m512 look_up(const __m512* x, __m512i columns) {
  __m512 found[kVectors / 2];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kVectors / 2; ++i) {
    found[i] = _mm512_permutex2var_ps(x[2 * i], columns, x[2 * i + 1]);
  }
#pragma GCC unroll 3
  for (int64_t left = kVectors / 4, bit = 32; left > 0; left /= 2, bit *= 2) {
    const __mmask16 upper = _mm512_test_epi32_mask(columns, _mm512_set1_epi32(static_cast<int>(bit)));
#pragma GCC unroll 4
    for (int64_t i = 0; i < left; ++i) {
      found[i] = _mm512_mask_blend_ps(upper, found[2 * i], found[2 * i + 1]);
    }
  }
  return found[0];
}

template <SparseValue kType, int64_t kVectors>
void look_up_lists(const SparseLists& lists, const float* activations, float* sums) {
  __m512 x[kVectors];
  const int64_t width = lists.shape.width;
#pragma GCC unroll 16
  for (int64_t i = 0; i < kVectors; ++i) {
    const int64_t left = std::clamp<int64_t>(width - 16 * i, 0, 16);
    x[i] = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << left) - 1), activations + 16 * i);
  }
  const __m512i end_of_block = _mm512_set1_epi32(static_cast<int>(width));
  const int64_t first = lists.list();
  for (int64_t i = 0; i < lists.groups; ++i) {
    const Span span(lists, lists.offsets + first + i);
    __m512 sum[2] = {};
    for (int64_t at = span.begin; at < span.end; at += 32) {
      // As a rule lists are longer than one vector; which are is hard to foresee.
#pragma GCC unroll 2
      for (int64_t part = 0; part < 2; ++part) {
        const int64_t left = std::clamp<int64_t>(span.end - at - 16 * part, 0, 16);
        const __m512i columns =
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lists.index + at) + part));
        const __mmask16 known = _mm512_mask_cmplt_epu32_mask(static_cast<__mmask16>((uint32_t{1} << left) - 1),
                                                             columns, end_of_block);  // the others fill up
        sum[part] = _mm512_mask3_fmadd_ps(look_up<kVectors>(x, columns), sixteen<kType>(lists.values, at + 16 * part),
                                          sum[part], known);
      }
    }
    sums[i] += _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
  }
}

template <SparseValue kType>
void look_up_lists(const SparseLists& lists, const float* activations, float* sums) {
  if (lists.shape.width <= 128) {
    look_up_lists<kType, 8>(lists, activations, sums);
  } else {
    look_up_lists<kType, 16>(lists, activations, sums);
  }
}

#endif

// Calls run(type), known when it is compiled.
template <class Run>
inline void with_type(SparseValue type, const Run& run) {
  switch (type) {
    case SparseValue::kFloat32: return run(std::integral_constant<SparseValue, SparseValue::kFloat32>{});
    case SparseValue::kBFloat16: return run(std::integral_constant<SparseValue, SparseValue::kBFloat16>{});
    case SparseValue::kFloat16: return run(std::integral_constant<SparseValue, SparseValue::kFloat16>{});
    default: return run(std::integral_constant<SparseValue, SparseValue::kInt8>{});
  }
}

// Whether 0 times an activation is 0, unless it is not multiplied anyway.
inline bool can_expand(const RowPanel& panel) {
#if defined(__AVX512F__)
  return panel.rows > 0;
#else
  bool finite = true;
  for (int64_t row = 0; row < panel.rows; ++row) {
    for (int64_t i = 0; i < kMaskWidth; ++i) {
      finite &= panel.activations[row * panel.row_step + i] * 0 == 0;
    }
  }
  return finite;
#endif
}

}  // namespace

int64_t most_rows(SparseLayout layout) {
  return kExpands && layout == SparseLayout::kBitmask ? 8 : 1;
}

void add_lists_to_rows(const SparseLists& lists, const RowPanel& panel, float* sums, int64_t sums_step) {
#if defined(PYPRUNE_EXPANDS)
  if (lists.shape.layout == SparseLayout::kBitmask && can_expand(panel)) {
    return with_type(lists.type, [&](auto type) { expand_lists<type>(lists, panel, sums, sums_step); });
  }
#endif
#if defined(__AVX512F__)
  if (lists.shape.layout == SparseLayout::kIndex) {
    for (int64_t row = 0; row < panel.rows; ++row) {
      with_type(lists.type, [&](auto type) {
        look_up_lists<type>(lists, panel.activations + row * panel.row_step, sums + row * sums_step);
      });
    }
    return;
  }
#endif
  for (int64_t row = 0; row < panel.rows; ++row) {
    with_layout(lists.shape.layout, [&](auto layout) {
      add_row<layout>(lists, panel.activations + row * panel.row_step, sums + row * sums_step);
    });
  }
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
