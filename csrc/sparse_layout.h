// How a weight without its zeros lies in memory, the same for every capability.
//
// Lists are in the order of blocks of columns, and in a block in the order of groups of rows. offsets says where each
// begins, and has one number more: where the last ends. A list is
//   index    one row (width <= 248): values, and as many columns in a byte each, counted from the block's first
//   rows     one row, all columns in one block (at most 65535): the same with two bytes, the lower first
//   block4   four rows (width <= 248): for each column that one of them has, a byte, and its four values
//   bitmask  one row of 256 columns: values, and a bit for each column, the lowest first, in 32 bytes
// Lists of index and rows are filled up to a multiple of four by zeros at column `width`, where kernels keep zeros:
// so nothing that is not kept is ever multiplied. A weight of `columns` has `blocks` blocks of `width`, a multiple of
// 8; the last may be narrower. Behind all lists there is slack, so that kernels may read some more than they use.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pyprune {

enum class SparseLayout : uint8_t { kIndex, kBitmask, kRows, kBlock4 };
constexpr int64_t kSparseLayouts = 4;
// What values are stored as; int8 times a scale for each row.
enum class SparseValue : uint8_t { kFloat32, kBFloat16, kFloat16, kInt8 };

constexpr int64_t kWidest = 248;         // of a block whose columns are bytes
constexpr int64_t kMaskWidth = 256;      // of a block of a bitmask
constexpr int64_t kMaskBytes = 32;       // of a list of a bitmask
constexpr int64_t kMostColumns = 65535;  // of rows
constexpr int64_t kFilled = 4;           // lists of index and rows have a multiple of it
constexpr int64_t kPieceSlack = 32;

struct SparseShape {
  SparseLayout layout;
  int64_t rows, columns;
  int64_t blocks, width;

  int64_t rows_of_group() const { return layout == SparseLayout::kBlock4 ? 4 : 1; }
  int64_t groups() const { return (rows + rows_of_group() - 1) / rows_of_group(); }
  int64_t lists() const { return blocks * groups(); }
  int64_t columns_of(int64_t block) const { return std::clamp(columns - block * width, int64_t{0}, width); }
  // Entries that a list may be behind the last one's end.
  int64_t slack() const { return layout == SparseLayout::kBitmask ? kMaskWidth + kPieceSlack : kPieceSlack; }
  int64_t index_size() const { return layout == SparseLayout::kRows ? 2 : 1; }
  // Bytes of the index of so many entries.
  int64_t index_bytes(int64_t entries) const {
    return layout == SparseLayout::kBitmask ? lists() * kMaskBytes : (entries + slack()) * index_size();
  }
  // Values of so many entries.
  int64_t value_count(int64_t entries) const { return (entries + slack()) * rows_of_group(); }
  bool is_possible() const {
    switch (layout) {
      case SparseLayout::kRows: return blocks == 1 && columns <= kMostColumns;
      case SparseLayout::kBitmask: return blocks * kMaskWidth >= columns && (blocks - 1) * kMaskWidth < columns;
      default: return blocks * kWidest >= columns && (blocks > 0 || columns == 0) && width <= kWidest;
    }
  }
};

inline SparseShape sparse_shape(SparseLayout layout, int64_t rows, int64_t columns, int64_t blocks) {
  const int64_t width = layout == SparseLayout::kRows      ? columns
                        : layout == SparseLayout::kBitmask ? kMaskWidth
                        : blocks > 0                       ? (columns + 8 * blocks - 1) / (8 * blocks) * 8
                                                           : 0;
  return {layout, rows, columns, blocks, width};
}

}  // namespace pyprune
