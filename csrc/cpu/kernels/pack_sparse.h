// From rows of a dense weight to lists of a sparse one and back. csrc/sparse_layout.h says what lists are. Each
// element of the weight is read once to count and once to move it.
#pragma once

#include "../../sparse_layout.h"
#include "capability_namespace.h"

namespace pyprune {

// Some rows of a weight, which begin with `first_group`; elements are bits of `size` bytes, not zero if one of the
// significant ones is set.
struct DenseRows {
  const void* data;
  int64_t size;
  uint64_t significant;
  int64_t first_row, rows;
};

enum class SparseFault : uint8_t { kNone, kOffset, kCount, kColumn, kOrder, kFill };

}  // namespace pyprune

// count_lists: how many entries each list of these rows has: counts[block * groups + group] with `groups` those
// given. fill_lists: writes the lists; false if one does not fit its offsets. `first` is the group of the first row.
// unpack_lists: rows [first, first + rows) of the dense weight; lists must be well formed.
// check_list: what is wrong with list number `list`, whose block has so many columns.
#define PYPRUNE_DECLARE_PACK_SPARSE                                                                            \
  void count_lists(const SparseShape& shape, const DenseRows& rows, int32_t* counts, int64_t step);            \
  bool fill_lists(const SparseShape& shape, const DenseRows& rows, const int32_t* offsets, void* values,       \
                  uint8_t* index);                                                                             \
  void unpack_lists(const SparseShape& shape, int64_t first_group, int64_t groups, const int32_t* offsets,     \
                    const void* values, int64_t size, const uint8_t* index, void* dense);                      \
  SparseFault check_lists(const SparseShape& shape, int64_t first_list, int64_t lists, const int32_t* offsets, \
                          int64_t entries, const uint8_t* index);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_PACK_SPARSE)
