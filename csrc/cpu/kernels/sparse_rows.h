// Lists of a sparse weight times one row of activations, or with bitmask a few: columns lie in the vectors.
//
// For each row of the weight, values are brought to where their columns are (bitmask: a vector of columns at a time;
// in a block where 0 times an activation is not 0, only with masks) or activations to where values are (the other
// layouts). Each list is read once for all rows of activations; the sums of a list are in the order
// that a capability likes, which depends on the number of rows only.
#pragma once

#include "sparse_block.h"

namespace pyprune {

// Rows of activations, one after the other in `row_step` floats, and their sums.
struct RowPanel {
  const float* activations;  // of the block; zeros from its last column up to its width, and there
  int64_t row_step;
  int64_t rows;
};

}  // namespace pyprune

// most_rows: how many rows of activations go faster so than as lanes.
// add_lists_to_rows: sums[row * sums_step + i] += ... for the rows i of the weight from the first group on.
#define PYPRUNE_DECLARE_SPARSE_ROWS       \
  int64_t most_rows(SparseLayout layout); \
  void add_lists_to_rows(const SparseLists& lists, const RowPanel& panel, float* sums, int64_t sums_step);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_SPARSE_ROWS)
