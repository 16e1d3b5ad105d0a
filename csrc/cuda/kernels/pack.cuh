// Contiguous elements as one bit each and the values of those whose bit is set, and back: see cpu/kernels/pack.h.
//
// A block takes tiles of kPackTile elements, a warp 32 neighbours at a time, whose bits are its ballot. First the
// bits of each tile are written or counted, then the counts are summed up in one block, so that each tile knows where
// its values lie; a thread finds its own among them by the bits before it. Integers only: the same on every run.
// Moves per element: its own size twice (pack: found, then moved) or once (unpack), one size per kept element, and
// the bits.
#pragma once

#include <cub/block/block_scan.cuh>

#include "launch.cuh"

namespace pyprune {
namespace {

constexpr int kPackThreads = 256;
constexpr int kPackWarps = kPackThreads / 32;
constexpr int64_t kPackTile = 8192;  // elements; a multiple of what a block takes at a time

inline int64_t pack_tiles(int64_t count) {
  return (count + kPackTile - 1) / kPackTile;
}

// Adds up what all warps of a block have counted; thread 0 writes it.
__device__ inline void write_tile_count(int64_t count, int64_t* tile_count) {
  __shared__ int64_t warps[kPackWarps];
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = count;
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t sum = 0;
    for (int warp = 0; warp < kPackWarps; ++warp) sum += warps[warp];
    *tile_count = sum;
  }
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    pack_bits_kernel(const T* data, T significant, int64_t count, uint8_t* bits, int64_t* tile_counts) {
  for (int64_t tile = blockIdx.x; tile * kPackTile < count; tile += gridDim.x) {
    int64_t kept = 0;  // the same in all threads of a warp
    for (int64_t at = threadIdx.x; at < kPackTile; at += kPackThreads) {
      const int64_t i = tile * kPackTile + at;
      const unsigned set = __ballot_sync(~0u, i < count && (data[i] & significant) != 0);
      const int lane = threadIdx.x % 32;
      if (lane < 4 && i - lane + 8 * lane < count) bits[i / 32 * 4 + lane] = static_cast<uint8_t>(set >> (8 * lane));
      kept += __popc(set);
    }
    write_tile_count(kept, &tile_counts[tile]);
  }
}

__device__ inline unsigned bits_of_warp(const uint8_t* bits, int64_t i, int64_t count) {
  const bool set = i < count && (bits[i / 8] >> (i % 8) & 1) != 0;
  return __ballot_sync(~0u, set);
}

__global__ void __launch_bounds__(kPackThreads)
    count_bits_kernel(const uint8_t* bits, int64_t count, int64_t* tile_counts) {
  for (int64_t tile = blockIdx.x; tile * kPackTile < count; tile += gridDim.x) {
    int64_t kept = 0;
    for (int64_t at = threadIdx.x; at < kPackTile; at += kPackThreads) {
      kept += __popc(bits_of_warp(bits, tile * kPackTile + at, count));
    }
    write_tile_count(kept, &tile_counts[tile]);
  }
}

// tile_counts[i] becomes the sum of those before it; the one behind the last is the sum of all. One block.
__global__ void __launch_bounds__(1024) sum_tiles_kernel(int64_t* tile_counts, int64_t tiles) {
  using Scan = cub::BlockScan<int64_t, 1024>;
  __shared__ typename Scan::TempStorage room;
  int64_t before = 0;
  for (int64_t first = 0; first < tiles; first += 1024) {
    const int64_t i = first + threadIdx.x;
    int64_t mine = i < tiles ? tile_counts[i] : 0, sum = 0;
    Scan(room).ExclusiveSum(mine, mine, sum);
    if (i < tiles) tile_counts[i] = before + mine;
    before += sum;
    __syncthreads();
  }
  if (threadIdx.x == 0) tile_counts[tiles] = before;
}

// kPack: values[..] = data[i] where bit i is set; otherwise data[i] = the value or 0.
template <bool kPack, typename T>
__global__ void __launch_bounds__(kPackThreads)
    move_values_kernel(T* data, const uint8_t* bits, int64_t count, const int64_t* tile_begins, T* values) {
  __shared__ int warps[2][kPackWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t tile = blockIdx.x; tile * kPackTile < count; tile += gridDim.x) {
    int64_t begin = tile_begins[tile];
    int turn = 0;
    for (int64_t at = threadIdx.x; at < kPackTile; at += kPackThreads, turn ^= 1) {
      const int64_t i = tile * kPackTile + at;
      const unsigned set = bits_of_warp(bits, i, count);
      if (lane == 0) warps[turn][warp] = __popc(set);
      __syncthreads();
      int before = __popc(set & ((1u << lane) - 1)), all = 0;
      for (int other = 0; other < kPackWarps; ++other) {
        before += other < warp ? warps[turn][other] : 0;
        all += warps[turn][other];
      }
      const bool kept = (set >> lane & 1) != 0;
      if (kPack && kept) values[begin + before] = data[i];
      if (!kPack && i < count) data[i] = kept ? values[begin + before] : T{0};
      begin += all;
    }
    __syncthreads();
  }
}

// tile_counts has room for pack_tiles(count) + 1; the last becomes the number of bits that are set.
template <typename T>
void launch_pack_bits(const T* data, T significant, int64_t count, uint8_t* bits, int64_t* tile_counts,
                      cudaStream_t stream) {
  const int64_t tiles = pack_tiles(count);
  if (tiles > 0) {
    launch(&pack_bits_kernel<T>, blocks_for(tiles), kPackThreads, stream, data, significant, count, bits,
           tile_counts);
  }
  launch(&sum_tiles_kernel, 1, 1024, stream, tile_counts, tiles);
}

inline void launch_count_bits(const uint8_t* bits, int64_t count, int64_t* tile_counts, cudaStream_t stream) {
  const int64_t tiles = pack_tiles(count);
  if (tiles > 0) launch(&count_bits_kernel, blocks_for(tiles), kPackThreads, stream, bits, count, tile_counts);
  launch(&sum_tiles_kernel, 1, 1024, stream, tile_counts, tiles);
}

template <bool kPack, typename T>
void launch_move_values(T* data, const uint8_t* bits, int64_t count, const int64_t* tile_begins, T* values,
                        cudaStream_t stream) {
  const int64_t tiles = pack_tiles(count);
  if (tiles > 0) {
    launch(&move_values_kernel<kPack, T>, blocks_for(tiles), kPackThreads, stream, data, bits, count, tile_begins,
           values);
  }
}

}  // namespace
}  // namespace pyprune
