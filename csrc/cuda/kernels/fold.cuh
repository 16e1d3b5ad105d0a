// weights[i][~masks[i]] = 0, in place; kept elements keep their bits.
//
// Layout: any strides without overlap. Where weight and mask lie alike in memory (in any order of dims) both are
// walked linearly, weights 16 bytes at a time; a pack that keeps everything is not written back. Moves per element: 1
// byte of mask and twice the weight's size.
#pragma once

#include "block_loop.cuh"
#include "launch.cuh"

namespace pyprune {
namespace {

template <typename T, int N>
struct Masked {
  Pack<T, N> weights;
  Pack<uint8_t, N> keep;
};

// Not inlined, so that each element type gets its own registers.
template <typename T>
__device__ __noinline__ void fold_run(T* data, const uint8_t* mask, const Layout* layout, const Run& run) {
  const auto load = [&](auto width, int64_t at) {
    constexpr int kWidth = decltype(width)::value;
    const Offsets offsets = kWidth == 1 ? offsets_of(layout, at) : Offsets{at, at};
    return Masked<T, kWidth>{load_pack<kWidth>(data + offsets.data), load_pack<kWidth>(mask + offsets.partner)};
  };
  const auto use = [&](auto width, int64_t at, const auto& item) {
    constexpr int kWidth = decltype(width)::value;
    Pack<T, kWidth> folded = item.weights;
    bool changed = false;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (item.keep.get(i) == 0) {
        folded.clear(i);
        changed = true;
      }
    }
    if (changed) store_pack(data + (kWidth == 1 ? offsets_of(layout, at).data : at), folded);
  };
  visit<T>(make_span(data, mask, layout == nullptr, run.begin, run.end), load, use);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) fold_kernel(TensorTable table) {
  const TileRange tiles = tiles_of_block(table);
  for (int64_t tile = tiles.begin; tile < tiles.end;) {
    const Run run = run_at(table, tile, tiles.end);
    const TableRow& row = table.rows[run.tensor];
    with_bits(row.dtype, [&](auto bits) {
      fold_run(static_cast<decltype(bits)*>(row.data), static_cast<const uint8_t*>(row.partner),
               layout_of(table, row), run);
    });
    tile = run.next_tile;
  }
}

inline void launch_fold(const TensorTable& table, cudaStream_t stream) {
  if (table.tiles > 0) launch(&fold_kernel, blocks_for(table.tiles), kThreads, stream, table);
}

}  // namespace
}  // namespace pyprune
