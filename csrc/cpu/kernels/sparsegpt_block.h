// The columns of a block of SparseGPT, one after the other, for some rows, with the factor R of H = R R^T.
//
// With d_i = w_i - (what column i becomes), and s_j = sums_j + sum of d_i R_ij over the columns i < j of the block:
// where the mask keeps, d_j = -s_j / R_jj and the weight becomes w_j - d_j; elsewhere d_j = w_j and it becomes +0.
// sums_j becomes d_j. With N:M each `size` columns choose as they are reached: those stay that have the `kept`
// largest scores |w_j R_jj + s_j|, with s_j as if all of them stayed; of equal ones the last. What the mask lacks
// never stays.
//
// Rows lie side by side in vectors and no sum crosses them; products are rounded before they are added, in the order
// of i: the same bits for any capability. columns / 2 multiply-adds per element from the first-level cache; weight,
// sums and mask are read and written once (2 * 2 item sizes + 2 bytes per element).
#pragma once

#include <cstdint>

#include "../../dtype.h"
#include "capability_namespace.h"

namespace pyprune {

constexpr int64_t kColumnsTogether = 4;  // whose sums over the columns before are made in one go
constexpr int64_t kLargestGroup = 64;    // of N:M

// Some rows of a block. Columns lie one after the other.
struct SparseGptRows {
  Dtype dtype;  // of weight and sums: float32 or float64
  void* weight;
  void* sums;
  uint8_t* mask;
  int64_t weight_step, sums_step, mask_step;  // from one row to the next
  int64_t rows, columns;
  int64_t kept, size;  // N:M; size 0: the mask is given
};

// How many columns are decided together.
constexpr int64_t group_width(int64_t size) {
  return size > 0 ? size : kColumnsTogether;
}

// Numbers of a packed factor: at most one more row than columns for each column, and its inverse diagonal.
constexpr int64_t packed_count(int64_t columns) {
  return columns * (columns + 3) / 2;
}

// Bytes that a thread needs to itself, 64-byte aligned: sums, weights and masks of the rows of the widest vectors.
constexpr int64_t sparsegpt_room(int64_t columns) {
  return columns * (3 * 128 + 32) + 2 * kLargestGroup * 128;
}

}  // namespace pyprune

// pack_factor: R, whose rows are `step` apart, in the order in which sparsegpt_rows reads it.
#define PYPRUNE_DECLARE_SPARSEGPT_BLOCK                                                                         \
  void pack_factor(const void* factor, int64_t step, Dtype dtype, int64_t columns, int64_t size, void* packed); \
  void sparsegpt_rows(const SparseGptRows& block, const void* packed, void* room);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_SPARSEGPT_BLOCK)
