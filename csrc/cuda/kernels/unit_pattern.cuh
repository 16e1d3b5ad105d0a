// Which elements of a tensor are in units that are kept; masks[i] = that, and weights[i] = 0 where they are not.
//
// Layout: any strides without overlap; elements are met in the order of memory. Dense tensors are walked 16 bytes at
// a time: a pack finds its first unit by division and the others by counting on. Moves per element: a byte of mask,
// or twice the weight's size in packs where units begin or end; packs that are kept are not touched, packs that go
// are only written. Masks of units are read through the cache.
#pragma once

#include "block_loop.cuh"
#include "launch.cuh"

namespace pyprune {

// The dimensions of a tensor as they lie in memory, outermost first, and its masks of units.
struct UnitLayout {
  const uint8_t* units;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];
  int64_t blocks[kMaxDims];
  int64_t unit_strides[kMaxDims];
  int32_t dims;
  int32_t narrow;  // fewer than 2^32 elements: 32-bit divisions do
};

namespace {

// An element: where it lies, and its place in the innermost dimension.
struct UnitPlace {
  int64_t offset;
  int64_t row;  // of the innermost dimension in the masks of units
  int64_t inner;
};

template <typename Index>
__device__ inline UnitPlace divide_out(const UnitLayout& layout, Index index) {
  UnitPlace place{0, 0, 0};
#pragma unroll 1
  for (int dim = layout.dims - 1; dim >= 0; --dim) {
    const Index size = static_cast<Index>(layout.sizes[dim]);
    const Index quotient = dim == 0 ? 0 : index / size;
    const Index remainder = index - quotient * size;
    place.offset += static_cast<int64_t>(remainder) * layout.strides[dim];
    if (dim == layout.dims - 1) {
      place.inner = static_cast<int64_t>(remainder);
    } else {
      place.row +=
          static_cast<int64_t>(remainder / static_cast<Index>(layout.blocks[dim])) * layout.unit_strides[dim];
    }
    index = quotient;
  }
  return place;
}

__device__ inline UnitPlace place_of(const UnitLayout& layout, int64_t index) {
  return layout.narrow != 0 ? divide_out<uint32_t>(layout, static_cast<uint32_t>(index))
                            : divide_out<uint64_t>(layout, static_cast<uint64_t>(index));
}

// Bit i tells whether element index + i is kept, for kWidth elements of which each has the next offset.
template <int kWidth>
__device__ inline uint32_t kept_from(const UnitLayout& layout, int64_t index) {
  uint32_t kept = 0;
  const int last = layout.dims - 1;
  for (int i = 0; i < kWidth;) {
    const UnitPlace place = place_of(layout, index + i);
    int64_t unit = layout.narrow != 0
                       ? static_cast<uint32_t>(place.inner) / static_cast<uint32_t>(layout.blocks[last])
                       : place.inner / layout.blocks[last];
    int64_t unit_ends = (unit + 1) * layout.blocks[last];
    int64_t inner = place.inner;
    do {
      const uint32_t keep = layout.units[place.row + unit * layout.unit_strides[last]] != 0;
      for (; i < kWidth && inner < unit_ends && inner < layout.sizes[last]; ++i, ++inner) kept |= keep << i;
      ++unit;
      unit_ends += layout.blocks[last];
    } while (i < kWidth && inner < layout.sizes[last]);
  }
  return kept;
}

template <int kWidth>
constexpr uint32_t kAllKept = (uint32_t{1} << kWidth) - 1;

// Not inlined, so that each element type gets its own registers.
template <typename T>
__device__ __noinline__ void fold_units_run(T* data, const UnitLayout& layout, bool linear, const Run& run) {
  const auto load = [&](auto width, int64_t at) { return kept_from<decltype(width)::value>(layout, at); };
  const auto use = [&](auto width, int64_t at, uint32_t kept) {
    constexpr int kWidth = decltype(width)::value;
    if (kept == kAllKept<kWidth>) return;
    T* const address = data + (linear ? at : place_of(layout, at).offset);
    Pack<T, kWidth> folded{};
    if (kept != 0) {
      folded = load_pack<kWidth>(address);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if ((kept >> i & 1) == 0) folded.clear(i);
      }
    }
    store_pack(address, folded);
  };
  visit<T, 1>(make_span(data, linear, run.begin, run.end), load, use);
}

__device__ __noinline__ void expand_run(uint8_t* mask, const UnitLayout& layout, bool linear, const Run& run) {
  const auto load = [&](auto width, int64_t at) { return kept_from<decltype(width)::value>(layout, at); };
  const auto use = [&](auto width, int64_t at, uint32_t kept) {
    constexpr int kWidth = decltype(width)::value;
    Pack<uint8_t, kWidth> bytes{};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) bytes.set_in_zeros(i, static_cast<uint8_t>(kept >> i & 1));
    store_pack(mask + (linear ? at : place_of(layout, at).offset), bytes);
  };
  visit<uint8_t, 1>(make_span(mask, linear, run.begin, run.end), load, use);
}

template <bool kFold>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    unit_pattern_kernel(TensorTable table, const UnitLayout* layouts) {
  const TileRange tiles = tiles_of_block(table);
  for (int64_t tile = tiles.begin; tile < tiles.end;) {
    const Run run = run_at(table, tile, tiles.end);
    const TableRow& row = table.rows[run.tensor];
    const UnitLayout& layout = layouts[run.tensor];
    if constexpr (kFold) {
      with_bits(row.dtype, [&](auto bits) {
        fold_units_run(static_cast<decltype(bits)*>(row.data), layout, row.contiguous, run);
      });
    } else {
      expand_run(static_cast<uint8_t*>(row.data), layout, row.contiguous, run);
    }
    tile = run.next_tile;
  }
}

template <bool kFold>
inline void launch_unit_pattern(const TensorTable& table, const UnitLayout* layouts, cudaStream_t stream) {
  if (table.tiles > 0) {
    launch(&unit_pattern_kernel<kFold>, blocks_for(table.tiles), kThreads, stream, table, layouts);
  }
}

}  // namespace
}  // namespace pyprune
