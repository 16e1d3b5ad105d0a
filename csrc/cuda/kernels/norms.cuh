// norms[i] = sqrt(sum of tensors[i]^2), in float64, with the additions in one fixed order.
//
// The order is that of norm_order.h, with a tile as the block; block sums are a vector again, summed alike until one
// is left. So the bits depend on the number of elements alone, and agree with the CPU. Elements missing from the last
// block count as zeros: adding +0 changes no sum. Sixteen threads are the sixteen lanes: their loads of consecutive
// elements join into whole sectors, and each has sixteen in flight, so the order asks for no detour through shared
// memory.
//
// Squares of float32, float16 and bfloat16 are exact in float64. Squares of float64 can leave its range: those are
// summed as they are, scaled by 2^-600 and by 2^600, and the sum that stayed in range is taken.
// Layout: any strides, elements in logical order. Moves per element: its own size, read once (and 8 bytes per tile).
#pragma once

#include <cmath>

#include "../../norm_order.h"
#include "block_loop.cuh"
#include "launch.cuh"

namespace pyprune {
namespace {

constexpr int kNormTeam = static_cast<int>(kNormLanes);
static_assert(kTile == kNormBlock, "a tile is a block of the order");
constexpr int kNormSteps = 16;
constexpr int kStridedNormSteps = 4;  // each holds a division's registers
constexpr int kFinishNormsThreads = 512;
constexpr int kScalings = 3;

__device__ inline int lane_in_team() {
  return threadIdx.x % kNormTeam;
}
__device__ inline unsigned team_mask() {
  return 0xffffu << (threadIdx.x & kNormTeam);
}

// Lane 0 of the team of sixteen gets the sum of its lanes, added in halves.
__device__ inline double add_lanes(double sum) {
  for (int half = kNormTeam / 2; half > 0; half /= 2) {
    sum = __dadd_rn(sum, __shfl_down_sync(team_mask(), sum, half, kNormTeam));
  }
  return sum;
}

// Calls add(value) for this lane's elements among `count`, in order; at(i) loads element i.
template <typename Bits, int kSteps, typename At, typename Add>
__device__ inline void visit_lane(int count, const At& at, const Add& add) {
  for (int first = lane_in_team(); first < count; first += kNormTeam * kSteps) {
    Bits values[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int i = first + step * kNormTeam;
      values[step] = i < count ? at(i) : Bits{};
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) add(values[step]);
  }
}

// The sum of at most 4096 sums.
__device__ inline double block_sum(const double* sums, int count) {
  double total = 0;
  visit_lane<double, kNormSteps>(
      count, [&](int i) { return sums[i]; }, [&](double value) { total = __dadd_rn(total, value); });
  return add_lanes(total);
}

template <typename T, int kSteps, typename At>
__device__ inline void sum_tile(int count, const At& at, int64_t tiles, double* sums) {
  double plain = 0;
  if constexpr (std::is_same_v<T, Float64>) {
    double down = 0;
    double up = 0;
    // __dmul_rn and __dadd_rn are never contracted into one rounding.
    visit_lane<typename T::Bits, kSteps>(count, at, [&](uint64_t bits) {
      const double value = T::value(bits);
      plain = __dadd_rn(plain, __dmul_rn(value, value));
      const double small = __dmul_rn(value, kScaleDown);
      down = __dadd_rn(down, __dmul_rn(small, small));
      const double large = __dmul_rn(value, kScaleUp);
      up = __dadd_rn(up, __dmul_rn(large, large));
    });
    down = add_lanes(down);
    up = add_lanes(up);
    if (lane_in_team() == 0) {
      sums[tiles] = down;
      sums[2 * tiles] = up;
    }
  } else {
    visit_lane<typename T::Bits, kSteps>(count, at, [&](typename T::Bits bits) {
      const double value = T::value(bits);
      plain = __fma_rn(value, value, plain);
    });
  }
  plain = add_lanes(plain);
  if (lane_in_team() == 0) sums[0] = plain;
}

// Sums of tiles: sums[scaling * tiles + tile], the scaled ones for float64 tensors only.
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sum_squares_kernel(TensorTable table, double* sums) {
  const int64_t teams = static_cast<int64_t>(gridDim.x) * (kThreads / kNormTeam);
  const int64_t team = static_cast<int64_t>(blockIdx.x) * (kThreads / kNormTeam) + threadIdx.x / kNormTeam;
  for (int64_t tile = team; tile < table.tiles; tile += teams) {
    const Run run = run_at(table, tile, tile + 1);
    const TableRow& row = table.rows[run.tensor];
    with_weight_type(row.dtype, [&](auto type) {
      using T = decltype(type);
      const auto* const data = static_cast<const typename T::Bits*>(row.data);
      const int count = static_cast<int>(run.end - run.begin);
      if (row.contiguous) {
        const auto at = [&](int i) { return data[run.begin + i]; };
        sum_tile<T, kNormSteps>(count, at, table.tiles, sums + tile);
      } else {
        const Layout* const layout = layout_of(table, row);
        const auto at = [&](int i) { return data[offsets_of(layout, run.begin + i).data]; };
        sum_tile<T, kStridedNormSteps>(count, at, table.tiles, sums + tile);
      }
    });
  }
}

__host__ __device__ inline int64_t tiles_over(int64_t count) {
  return (count + kTile - 1) / kTile;
}

__device__ inline int tile_size(int64_t count, int64_t tile) {
  const int64_t left = count - tile * kTile;
  return static_cast<int>(left < kTile ? left : kTile);
}

// What is left of a tensor's first-level sums: its norm. One block per tensor; `scratch` holds `stride` second-level
// sums per scaling.
__global__ void __launch_bounds__(kFinishNormsThreads)
    finish_norms_kernel(TensorTable table, const double* sums, double* scratch, int64_t stride, double* norms) {
  const int team = threadIdx.x / kNormTeam;
  for (int32_t tensor = blockIdx.x; tensor < table.size; tensor += gridDim.x) {
    const TableRow& row = table.rows[tensor];
    const int scalings = row.dtype == Dtype::kFloat64 ? kScalings : 1;
    const int64_t count = tiles_of(row);
    // Enough room for the tensors before this one: tiles_over(a) + tiles_over(b) <= (a + b) / kTile + 2.
    double* const seconds = scratch + row.first_tile / kTile + tensor;
    for (int scaling = 0; scaling < scalings; ++scaling) {
      const double* const firsts = sums + scaling * table.tiles + row.first_tile;
      for (int64_t tile = team; tile < tiles_over(count); tile += kFinishNormsThreads / kNormTeam) {
        const double sum = block_sum(firsts + tile * kTile, tile_size(count, tile));
        if (lane_in_team() == 0) seconds[scaling * stride + tile] = sum;
      }
    }
    __syncthreads();
    if (team != 0) continue;

    double totals[kScalings] = {0, 0, 0};
    for (int scaling = 0; scaling < scalings; ++scaling) {
      double* const level = seconds + scaling * stride;
      int64_t left = tiles_over(count);
      for (; left > 1; left = tiles_over(left)) {  // in place: sum t is written after sums from 4096 t on were read
        for (int64_t tile = 0; tile < tiles_over(left); ++tile) {
          const double sum = block_sum(level + tile * kTile, tile_size(left, tile));
          if (lane_in_team() == 0) level[tile] = sum;
          __syncwarp(team_mask());
        }
      }
      if (left == 1) totals[scaling] = level[0];
    }
    if (lane_in_team() != 0) continue;
    if (scalings == 1 || (kSmallestSum <= totals[0] && totals[0] < HUGE_VAL)) {
      norms[tensor] = __dsqrt_rn(totals[0]);
    } else if (totals[0] < HUGE_VAL) {
      norms[tensor] = __dmul_rn(__dsqrt_rn(totals[2]), kScaleDown);
    } else {
      norms[tensor] = __dmul_rn(__dsqrt_rn(totals[1]), kScaleUp);
    }
  }
}

// Numbers that launch_norms needs room for.
struct NormsRoom {
  int scalings;
  int64_t stride;  // of the scratch
  int64_t sums, scratch;

  NormsRoom(const TensorTable& table, bool any_double)
      : scalings(any_double ? kScalings : 1),
        stride(table.tiles / kTile + table.size + 1),
        sums(scalings * table.tiles),
        scratch(scalings * stride) {}
};

inline void launch_norms(const TensorTable& table, const NormsRoom& room, double* sums, double* scratch,
                         double* norms, cudaStream_t stream) {
  constexpr int64_t kTeamsPerBlock = kThreads / kNormTeam;
  const int64_t blocks = blocks_for((table.tiles + kTeamsPerBlock - 1) / kTeamsPerBlock);
  if (blocks > 0) launch(&sum_squares_kernel, blocks, kThreads, stream, table, sums);
  launch(&finish_norms_kernel, std::min<int64_t>(table.size, 65535), kFinishNormsThreads, stream, table, sums,
         scratch, room.stride, norms);
}

}  // namespace
}  // namespace pyprune
