// A list of tensors as the kernels see it: a table in device memory, cut into tiles of 4096 elements.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../dtype.h"

namespace pyprune {

constexpr int kTile = 4096;  // elements; a multiple of every vector width, so all tiles of a tensor are aligned alike
constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kMaxDims = 8;

// Whether elements are met in logical (C) order, or in the order that lies best in memory.
enum class Order { kLogical, kAny };

// Sizes and strides (in elements, outermost first) of a tensor, and of its partner if it has one.
struct Layout {
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];
  int64_t partner_strides[kMaxDims];
  int32_t dims;
  int32_t narrow;  // fewer than 2^32 elements: 32-bit divisions do
};

// A tensor and its partner: another one of the same shape, its mask or its gradient.
struct TableRow {
  void* data;
  void* partner;
  const uint8_t* base;  // null, or laid out as the partner: what it lacks goes before all else
  int64_t numel;
  int64_t first_tile;  // tiles and elements of the tensors before it
  int64_t first_element;
  int32_t layout;  // row of the layout table where `contiguous` is false, else -1
  Dtype dtype;
  bool contiguous;  // element i lies at data[i], and its partner at partner[i]
  bool dense;       // the elements fill data[0 .. numel), in some order
};

struct TensorTable {
  const TableRow* rows;
  const Layout* layouts;
  int32_t size;
  int64_t tiles;
};

// The last row that starts at or before `place`: tensors without elements are passed over.
template <int64_t TableRow::* kFirst>
__device__ inline int32_t last_row_from(const TensorTable& table, int64_t place) {
  int32_t low = 0;
  int32_t high = table.size;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (table.rows[middle].*kFirst <= place) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ inline int32_t tensor_of_tile(const TensorTable& table, int64_t tile) {
  return last_row_from<&TableRow::first_tile>(table, tile);
}

// Elements are numbered through the whole list.
__device__ inline int32_t tensor_of_element(const TensorTable& table, int64_t element) {
  return last_row_from<&TableRow::first_element>(table, element);
}

__host__ __device__ inline int64_t tiles_of(const TableRow& row) {
  return (row.numel + kTile - 1) / kTile;
}

// The tiles of one block or warp: an equal, contiguous share, so that it meets few tensors.
struct TileRange {
  int64_t begin;
  int64_t end;
};

__device__ inline TileRange share_of(int64_t tiles, int64_t worker, int64_t workers) {
  return {tiles * worker / workers, tiles * (worker + 1) / workers};
}

__device__ inline TileRange tiles_of_block(const TensorTable& table) {
  return share_of(table.tiles, blockIdx.x, gridDim.x);
}

// The elements that tiles [begin, end) hold of one tensor, and the first tile after them.
struct Run {
  int32_t tensor;
  int64_t begin;
  int64_t end;
  int64_t next_tile;
};

__device__ inline Run run_at(const TensorTable& table, int64_t tile, int64_t end_tile) {
  const int32_t tensor = tensor_of_tile(table, tile);
  const TableRow& row = table.rows[tensor];
  const int64_t last = row.first_tile + tiles_of(row);
  const int64_t next = last < end_tile ? last : end_tile;
  const int64_t end = (next - row.first_tile) * kTile;
  return {tensor, (tile - row.first_tile) * kTile, end < row.numel ? end : row.numel, next};
}

struct Offsets {
  int64_t data;
  int64_t partner;  // and of a base
};

template <typename Index>
__device__ inline Offsets divide_out(const Layout& layout, Index index) {
  Offsets offsets{0, 0};
#pragma unroll 1
  for (int dim = layout.dims - 1; dim > 0; --dim) {
    const Index size = static_cast<Index>(layout.sizes[dim]);
    const Index quotient = index / size;
    const int64_t remainder = static_cast<int64_t>(index - quotient * size);
    offsets.data += remainder * layout.strides[dim];
    offsets.partner += remainder * layout.partner_strides[dim];
    index = quotient;
  }
  offsets.data += static_cast<int64_t>(index) * layout.strides[0];
  offsets.partner += static_cast<int64_t>(index) * layout.partner_strides[0];
  return offsets;
}

// Where element `index` lies; a null layout means contiguous.
__device__ inline Offsets offsets_of(const Layout* layout, int64_t index) {
  if (layout == nullptr) return {index, index};
  return layout->narrow != 0 ? divide_out<uint32_t>(*layout, static_cast<uint32_t>(index))
                             : divide_out<uint64_t>(*layout, static_cast<uint64_t>(index));
}

__device__ inline const Layout* layout_of(const TensorTable& table, const TableRow& row) {
  return row.contiguous ? nullptr : table.layouts + row.layout;
}

}  // namespace pyprune
