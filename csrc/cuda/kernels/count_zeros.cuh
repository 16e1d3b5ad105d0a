// zeros[i] = number of elements of tensors[i] that equal zero (-0.0 does, False does).
//
// Layout: any strides; tensors whose elements fill their memory in any order of dims are read linearly, 16 bytes at a
// time. Counting knows no order, and integer counters make the result deterministic.
// Moves per element: its own size, read once.
#pragma once

#include "block_loop.cuh"
#include "launch.cuh"

namespace pyprune {
namespace {

// A weight is zero when only its sign bit may be set.
__device__ inline bool is_zero(uint8_t boolean) {
  return boolean == 0;
}
__device__ inline bool is_zero(uint16_t bits) {
  return (bits & 0x7fffu) == 0;
}
__device__ inline bool is_zero(uint32_t bits) {
  return bits << 1 == 0;
}
__device__ inline bool is_zero(uint64_t bits) {
  return bits << 1 == 0;
}

// Not inlined, so that each element type gets its own registers.
template <typename T>
__device__ __noinline__ int64_t zeros_in(const T* data, const Layout* layout, const Run& run) {
  int64_t zeros = 0;
  const auto load = [&](auto width, int64_t at) {
    constexpr int kWidth = decltype(width)::value;
    return load_pack<kWidth>(data + (kWidth == 1 ? offsets_of(layout, at).data : at));
  };
  const auto use = [&](auto width, int64_t, const auto& pack) {
#pragma unroll
    for (int i = 0; i < decltype(width)::value; ++i) zeros += is_zero(pack.get(i));
  };
  visit<T>(make_span(data, layout == nullptr, run.begin, run.end), load, use);
  return zeros;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    count_zeros_kernel(TensorTable table, int64_t* zeros) {
  const TileRange tiles = tiles_of_block(table);
  for (int64_t tile = tiles.begin; tile < tiles.end;) {
    const Run run = run_at(table, tile, tiles.end);
    const TableRow& row = table.rows[run.tensor];
    const Layout* layout = layout_of(table, row);
    int64_t count = 0;
    with_bits(row.dtype,
              [&](auto bits) { count = zeros_in(static_cast<const decltype(bits)*>(row.data), layout, run); });
    add_block_total(count, &zeros[run.tensor]);
    tile = run.next_tile;
  }
}

// Adds to zeros[i], which are zero at the start.
inline void launch_count_zeros(const TensorTable& table, int64_t* zeros, cudaStream_t stream) {
  if (table.tiles > 0) launch(&count_zeros_kernel, blocks_for(table.tiles), kThreads, stream, table, zeros);
}

}  // namespace
}  // namespace pyprune
