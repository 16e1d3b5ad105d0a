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
  for (int64_t i = 0; i < count; i += 4) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < 4; ++k) {
      const float* const lanes = panel + static_cast<int64_t>(columns[i + k]) * kLanes;
      const Floats value = broadcast(values[i + k]);
#pragma GCC unroll 8
      for (int64_t v = 0; v < kVectors; ++v) {
        sum[k % kSets][v] = multiply_add(value, load(lanes + v * kWidth), sum[k % kSets][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t v = 0; v < kVectors; ++v) {
    Floats all = sum[0][v];
    if constexpr (kSets == 2) all = all + sum[1][v];
    if constexpr (kSets == 4) all = (all + sum[1][v]) + (sum[2][v] + sum[3][v]);
    store(sums + v * kWidth, all);
  }
}

template <int64_t kLanes>
void add_rows(const SparseLists& lists, const float* panel, float* sums) {
  constexpr int64_t kVectors = std::min(kLanes / kWidth, kMostVectors), kPart = kVectors * kWidth;
  PieceRoom room;
  for (int64_t group = 0; group < lists.groups; ++group, sums += kLanes) {
    pieces(lists, lists.first + group, room, [&](const float* values, const auto* columns, int64_t count) {
      for (int64_t part = 0; part < kLanes; part += kPart) {
        add_piece<kLanes, kVectors>(values, columns, count, panel + part, sums + part);
      }
    });
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

template <int64_t kLanes>
void add_fours(const SparseLists& lists, const float* panel, float* sums) {
#if defined(__AVX512F__)
  constexpr int64_t kMost = 4;
#else
  constexpr int64_t kMost = 2;
#endif
  constexpr int64_t kVectors = std::min(kLanes / kWidth, kMost), kPart = kVectors * kWidth;
  PieceRoom room;
  for (int64_t group = 0; group < lists.groups; ++group, sums += 4 * kLanes) {
    const Span span = span_of(lists, lists.first + group);
    for (int64_t begin = span.begin; begin < span.end; begin += kPiece) {
      const int64_t count = std::min(kPiece, span.end - begin);
      const float* values = room.values;
      if (lists.type == SparseValue::kFloat32) {
        values = static_cast<const float*>(lists.values) + 4 * begin;
      } else {
        widen(lists.type, lists.values, 4 * begin, 4 * count, room.values);
      }
      for (int64_t part = 0; part < kLanes; part += kPart) {
        add_piece_of_four<kLanes, kVectors>(values, lists.index + begin, count, panel + part, sums + part);
      }
    }
  }
}

}  // namespace

int64_t least_lanes() {
  return std::max<int64_t>(8, kWidth);
}

void add_lists(const SparseLists& lists, const float* panel, int64_t lanes, float* sums) {
  const auto run = [&]<int64_t kLanes>(std::integral_constant<int64_t, kLanes>) {
    if (lists.shape.layout == SparseLayout::kBlock4) {
      add_fours<kLanes>(lists, panel, sums);
    } else {
      add_rows<kLanes>(lists, panel, sums);
    }
  };
  switch (lanes) {
#if !defined(__AVX512F__)
    case 8: return run(std::integral_constant<int64_t, 8>{});
#endif
    case 16: return run(std::integral_constant<int64_t, 16>{});
    case 32: return run(std::integral_constant<int64_t, 32>{});
    default: return run(std::integral_constant<int64_t, 64>{});
  }
}

void add_lists_to_one(const SparseLists& lists, const float* panel, float* sums) {
  PieceRoom room;
  for (int64_t group = 0; group < lists.groups; ++group) {
    if (lists.shape.layout == SparseLayout::kBlock4) {
      const Span span = span_of(lists, lists.first + group);
      float sum[4];
      std::memcpy(sum, sums + 4 * group, sizeof(sum));
      for (int64_t begin = span.begin; begin < span.end; begin += kPiece) {
        const int64_t count = std::min(kPiece, span.end - begin);
        widen(lists.type, lists.values, 4 * begin, 4 * count, room.values);
        for (int64_t i = 0; i < count; ++i) {
          const float x = panel[lists.index[begin + i]];
          for (int64_t row = 0; row < 4; ++row) {
            sum[row] += room.values[4 * i + row] * x;
          }
        }
      }
      std::memcpy(sums + 4 * group, sum, sizeof(sum));
      continue;
    }
    pieces(lists, lists.first + group, room, [&](const float* values, const auto* columns, int64_t count) {
      float sum[4] = {sums[group], 0, 0, 0};
      for (int64_t i = 0; i < count; i += 4) {
        for (int64_t k = 0; k < 4; ++k) {
          sum[k] += values[i + k] * panel[columns[i + k]];
        }
      }
      sums[group] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    });
  }
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
