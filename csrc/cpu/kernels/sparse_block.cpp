#include "sparse_block.h"

#include "list_pieces.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

// As many vectors as registers hold beside what is multiplied.
#if defined(__AVX512F__)
constexpr int64_t kMostVectors = 4;
#else
constexpr int64_t kMostVectors = 8;
#endif

// sums[lane] += values[i] * panel[columns[i]][lane] for so many lanes; they are loaded and stored once.
template <int64_t kLanes, int64_t kVectors, class Column>
inline void add_piece(const float* values, const Column* columns, int64_t count, const float* panel, float* sums) {
  // Enough sums that one need not wait for the addition before.
  constexpr int64_t kSets = kVectors >= 8 ? 1 : kVectors >= 4 ? 2 : 4;
  Floats sum[kSets][kVectors] = {};
#pragma GCC unroll 8
  for (int64_t v = 0; v < kVectors; ++v) {
    sum[0][v] = load(sums + v * kWidth);
  }
  const auto add = [&]<int k>(std::integral_constant<int, k>, Floats four, int64_t column) {
    const float* const lanes = panel + column * kLanes;
    const Floats value = one_of_four<k>(four);
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v) {
      sum[k % kSets][v] = multiply_add(value, load(lanes + v * kWidth), sum[k % kSets][v]);
    }
  };
  for (int64_t i = 0; i < count; i += 4) {
    const Floats four = repeat_four(values + i);
    add(std::integral_constant<int, 0>{}, four, columns[i]);
    add(std::integral_constant<int, 1>{}, four, columns[i + 1]);
    add(std::integral_constant<int, 2>{}, four, columns[i + 2]);
    add(std::integral_constant<int, 3>{}, four, columns[i + 3]);
  }
#pragma GCC unroll 8
  for (int64_t v = 0; v < kVectors; ++v) {
    Floats all = sum[0][v];
    if constexpr (kSets == 2) all = all + sum[1][v];
    if constexpr (kSets == 4) all = (all + sum[1][v]) + (sum[2][v] + sum[3][v]);
    store(sums + v * kWidth, all);
  }
}

// Four rows at a time: sums[row][lane] += values[i][row] * panel[columns[i]][lane].
template <int64_t kLanes, int64_t kVectors>
inline void add_piece_of_four(const float* values, const uint8_t* columns, int64_t count, const float* panel,
                              float* sums) {
  Floats sum[4][kVectors];
#pragma GCC unroll 4
  for (int64_t row = 0; row < 4; ++row) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) {
      sum[row][v] = load(sums + row * kLanes + v * kWidth);
    }
  }
  for (int64_t i = 0; i < count; ++i, values += 4) {
    const float* const lanes = panel + static_cast<int64_t>(columns[i]) * kLanes;
    Floats x[kVectors];
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) {
      x[v] = load(lanes + v * kWidth);
    }
#pragma GCC unroll 4
    for (int64_t row = 0; row < 4; ++row) {
      const Floats value = broadcast(values[row]);
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) {
        sum[row][v] = multiply_add(value, x[v], sum[row][v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int64_t row = 0; row < 4; ++row) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) {
      store(sums + row * kLanes + v * kWidth, sum[row][v]);
    }
  }
}

#if defined(__AVX512F__)
constexpr int64_t kMostOfFour = 4;
#else
constexpr int64_t kMostOfFour = 2;
#endif

template <SparseLayout kLayout, int64_t kLanes>
void add_all(const SparseLists& lists, const float* panel, float* sums) {
  constexpr bool kFour = kLayout == SparseLayout::kBlock4;
  constexpr int64_t kVectors = std::min(kLanes / kWidth, kFour ? kMostOfFour : kMostVectors);
  constexpr int64_t kPart = kVectors * kWidth;
  PieceRoom room;
  const int64_t first = lists.list();
  for (int64_t list = first; list < first + lists.groups; ++list, sums += kFour ? 4 * kLanes : kLanes) {
    pieces<kLayout>(lists, list, room, [&](const float* values, const auto* columns, int64_t count) {
      for (int64_t part = 0; part < kLanes; part += kPart) {
        if constexpr (kFour) {
          add_piece_of_four<kLanes, kVectors>(values, columns, count, panel + part, sums + part);
        } else {
          add_piece<kLanes, kVectors>(values, columns, count, panel + part, sums + part);
        }
      }
    });
  }
}

}  // namespace

int64_t least_lanes() {
  return std::max<int64_t>(8, kWidth);
}

void add_lists(const SparseLists& lists, const float* panel, int64_t lanes, float* sums) {
  with_layout(lists.shape.layout, [&](auto layout) {
    switch (lanes) {
#if !defined(__AVX512F__)
      case 8: return add_all<layout, 8>(lists, panel, sums);
#endif
      case 16: return add_all<layout, 16>(lists, panel, sums);
      case 32: return add_all<layout, 32>(lists, panel, sums);
      default: return add_all<layout, 64>(lists, panel, sums);
    }
  });
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
