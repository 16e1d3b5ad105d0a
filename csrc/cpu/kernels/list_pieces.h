// Lists of all layouts as pieces of one form: float values and columns, a multiple of four.
#pragma once

#include <type_traits>

#include "float_lanes.h"
#include "sparse_block.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

constexpr int64_t kPiece = 256;

// Where a piece that does not lie as it should is put.
struct PieceRoom {
  alignas(64) float values[4 * kPiece + 2 * kPieceSlack];
  alignas(64) uint16_t columns[kPiece + 2 * kPieceSlack];
};

// Entries [begin, end) of a list, cut to those that there are.
struct Span {
  Span(const SparseLists& lists, const int32_t* offsets)
      : begin(static_cast<uint32_t>(offsets[0])),
        end(std::min<int64_t>(static_cast<uint32_t>(offsets[1]), lists.entries)) {}
  int64_t begin, end;
};

// The bytes of a mask as the columns whose bits are set; room for 8 more. Returns their number.
struct BitColumns {
  constexpr BitColumns() : columns() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int bit = 0, next = 0; bit < 8; ++bit) {
        if ((byte >> bit & 1) != 0) columns[byte][next++] = static_cast<uint16_t>(bit);
      }
    }
  }
  alignas(16) uint16_t columns[256][8];
};
constexpr BitColumns kBitColumns;

inline int64_t columns_of_mask(const uint8_t* mask, uint16_t* columns) {
  typedef uint16_t Eight __attribute__((vector_size(16), aligned(2), may_alias));
  int64_t count = 0;
  for (int64_t i = 0; i < kMaskBytes; ++i) {
    const Eight some = *reinterpret_cast<const Eight*>(kBitColumns.columns[mask[i]]);
    *reinterpret_cast<Eight*>(columns + count) = some + static_cast<uint16_t>(8 * i);
    count += __builtin_popcount(mask[i]);
  }
  return count;
}

// Calls use(values, columns, count) for the pieces of a list.
template <SparseLayout kLayout, class Use>
inline void pieces(const SparseLists& lists, int64_t list, PieceRoom& room, const Use& use) {
  const Span span(lists, lists.offsets + list);
  if constexpr (kLayout == SparseLayout::kBitmask) {
    const int64_t count = columns_of_mask(lists.index + list * kMaskBytes, room.columns),
                  filled = (count + 3) / 4 * 4;
    widen(lists.type, lists.values, std::min(span.begin, lists.entries), count, room.values);
    for (int64_t i = count; i < filled; ++i) {
      room.columns[i] = kMaskWidth;
      room.values[i] = 0;
    }
    use(room.values, room.columns, filled);
  } else {
    constexpr int64_t kHeight = kLayout == SparseLayout::kBlock4 ? 4 : 1;
    for (int64_t begin = span.begin; begin < span.end; begin += kPiece) {
      const int64_t count = std::min(kPiece, span.end - begin);
      const float* values = room.values;
      if (lists.type == SparseValue::kFloat32) {
        values = static_cast<const float*>(lists.values) + begin * kHeight;
      } else {
        widen(lists.type, lists.values, begin * kHeight, count * kHeight, room.values);
      }
      if constexpr (kLayout == SparseLayout::kRows) {
        const uint16_t last = static_cast<uint16_t>(lists.shape.width);
        uint16_t found[kPiece + kPieceSlack];
        std::memcpy(found, lists.index + 2 * begin, (count + kPieceSlack) * 2);
        for (int64_t i = 0; i < (count + 15) / 16 * 16; ++i) {
          room.columns[i] = std::min(found[i], last);
        }
        use(values, room.columns, count);
      } else {
        use(values, lists.index + begin, count);
      }
    }
  }
}

// Calls run(layout), known when it is compiled.
template <class Run>
inline void with_layout(SparseLayout layout, const Run& run) {
  switch (layout) {
    case SparseLayout::kIndex: return run(std::integral_constant<SparseLayout, SparseLayout::kIndex>{});
    case SparseLayout::kBitmask: return run(std::integral_constant<SparseLayout, SparseLayout::kBitmask>{});
    case SparseLayout::kRows: return run(std::integral_constant<SparseLayout, SparseLayout::kRows>{});
    default: return run(std::integral_constant<SparseLayout, SparseLayout::kBlock4>{});
  }
}

}  // namespace
}  // namespace pyprune::PYPRUNE_CAPABILITY
