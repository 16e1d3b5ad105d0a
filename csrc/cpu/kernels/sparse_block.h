// Lists of a sparse weight times activations, a block of columns at a time (after Elsen et al., Fast Sparse
// ConvNets).
//
// Activations lie as a panel: for each column of the block `lanes` of them side by side, then a column of zeros,
// which is what fills lists up. For each row the sums of all lanes stay in registers, and each value is multiplied
// with the lanes of its column: sums[row][lane] += value * panel[column][lane]. Additions are in the order of the
// list, in one to four sums per lane (by lanes and capability), which are added at the end.
//
// Per multiply-add of a vector one load from the first-level cache; the panel of a block should fit there. With
// block4 a load serves four rows. Values, columns and sums are read once per tile of lanes.
#pragma once

#include "../../sparse_layout.h"
#include "capability_namespace.h"

namespace pyprune {

constexpr int64_t kMostLanes = 64;

// Lists of some groups of rows of one block. Whatever is in them, nothing is read outside of `entries` and the slack
// behind, and of the 256 columns from the panel's first on, and with rows of the panel's own.
struct SparseLists {
  SparseShape shape;
  SparseValue type;
  const void* values;      // of the whole weight
  const uint8_t* index;    // of the whole weight
  const int32_t* offsets;  // of the whole weight
  int64_t entries;         // of the whole weight
  int64_t block;           // of columns
  int64_t first, groups;   // of rows

  int64_t list() const { return block * shape.groups() + first; }
};

}  // namespace pyprune

// add_lists: lanes is least_lanes() or a larger power of two up to 64; sums are those of the first group on.
#define PYPRUNE_DECLARE_SPARSE_BLOCK                                                        \
  void add_lists(const SparseLists& lists, const float* panel, int64_t lanes, float* sums); \
  int64_t least_lanes();

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_SPARSE_BLOCK)
