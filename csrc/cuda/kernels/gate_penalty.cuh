// penalty[i] = the number of logits[i] above 0, or the sum of sigma(logits[i] + shift), in float64; and the gradient
// of the sum, grad[i] * sigma'(logits[i] + shift).
//
// One warp sums a tile, each lane every 32nd element in order, then lanes are added in halves; one block per tensor
// sums the tiles in the same way. So the order depends on the number of elements alone.
// Layout: any strides. Sums take elements in logical order, gradients as they lie in memory, 16 bytes at a time where
// logits and gradient lie alike. Moves per logit: its own size for the sum, twice that for the gradient.
#pragma once

#include "../../gate_math.h"
#include "block_loop.cuh"
#include "launch.cuh"

namespace pyprune {
namespace {

constexpr int kPenaltySteps = 8;
constexpr int kPenaltyPacks = 2;  // what registers can hold beside the arithmetic
constexpr int kFinishPenaltiesThreads = 512;

template <class Real>
__device__ inline Odds<Real> open_odds(Real logit, Real shift) {
  return Odds<Real>(exponential(within_range(logit + shift)), Real(1));
}

template <typename T>
__device__ inline double lane_sum(const TableRow& row, const Layout* layout, const Run& run, bool hard,
                                  double shift) {
  using Value = typename T::Value;
  const auto* const data = static_cast<const typename T::Bits*>(row.data);
  const int lane = threadIdx.x % 32;
  double sum = 0;
#pragma unroll 1
  for (int64_t first = run.begin + lane; first < run.end; first += kPenaltySteps * 32) {
    typename T::Bits logits[kPenaltySteps];
#pragma unroll
    for (int step = 0; step < kPenaltySteps; ++step) {
      const int64_t at = first + step * 32;
      if (at < run.end) logits[step] = data[offsets_of(layout, at).data];
    }
#pragma unroll
    for (int step = 0; step < kPenaltySteps; ++step) {
      if (first + step * 32 >= run.end) break;
      const Value logit = T::value(logits[step]);
      sum += hard ? (logit > Value(0) ? 1.0 : 0.0) : open_odds(logit, static_cast<Value>(shift)).one;
    }
  }
  return sum;
}

// Launched once for each element type of the list, so that each gets its own registers.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sum_penalties_kernel(TensorTable table, bool hard, double shift, double* sums) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  for (int64_t tile = warp; tile < table.tiles; tile += warps) {
    const Run run = run_at(table, tile, tile + 1);
    const TableRow& row = table.rows[run.tensor];
    if (row.dtype != T::kDtype) continue;
    const double sum = warp_sum(lane_sum<T>(row, layout_of(table, row), run, hard, shift));
    if (threadIdx.x % 32 == 0) sums[tile] = sum;
  }
}

__global__ void __launch_bounds__(kFinishPenaltiesThreads)
    finish_penalties_kernel(TensorTable table, const double* sums, double* penalties) {
  constexpr int kWarps = kFinishPenaltiesThreads / 32;
  __shared__ double of_warps[kWarps];
  for (int32_t tensor = blockIdx.x; tensor < table.size; tensor += gridDim.x) {
    const TableRow& row = table.rows[tensor];
    const int64_t count = tiles_of(row);
    double sum = 0;
    for (int64_t tile = threadIdx.x; tile < count; tile += kFinishPenaltiesThreads)
      sum += sums[row.first_tile + tile];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
      sum = warp_sum(threadIdx.x < kWarps ? of_warps[threadIdx.x] : 0);
      if (threadIdx.x == 0) penalties[tensor] = sum;
    }
    __syncthreads();  // the next tensor writes of_warps again
  }
}

template <typename T>
__device__ inline void write_gradients(const TableRow& row, const Layout* layout, const Run& run, double grad,
                                       double shift) {
  using Bits = typename T::Bits;
  using Value = typename T::Value;
  const Bits* const logits = static_cast<const Bits*>(row.data);
  Bits* const gradients = static_cast<Bits*>(row.partner);
  const auto load = [&](auto width, int64_t at) {
    constexpr int kWidth = decltype(width)::value;
    return load_pack<kWidth>(logits + (kWidth == 1 ? offsets_of(layout, at).data : at));
  };
  const auto use = [&](auto width, int64_t at, const auto& pack) {
    constexpr int kWidth = decltype(width)::value;
    Pack<Bits, kWidth> result{};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Odds<Value> odds = open_odds(T::value(pack.get(i)), static_cast<Value>(shift));
      result.set_in_zeros(i, T::bits(static_cast<Value>(grad) * (odds.one * odds.other)));
    }
    store_pack(gradients + (kWidth == 1 ? offsets_of(layout, at).partner : at), result);
  };
  visit<Bits, kPenaltyPacks>(make_span(logits, gradients, layout == nullptr, run.begin, run.end), load, use);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    penalty_gradient_kernel(TensorTable table, const double* grads, int64_t grad_stride, double shift) {
  const TileRange tiles = tiles_of_block(table);
  for (int64_t tile = tiles.begin; tile < tiles.end;) {
    const Run run = run_at(table, tile, tiles.end);
    const TableRow& row = table.rows[run.tensor];
    if (row.dtype == T::kDtype) {
      write_gradients<T>(row, layout_of(table, row), run, grads[run.tensor * grad_stride], shift);
    }
    tile = run.next_tile;
  }
}

// Calls use(T{}) for each element type in the list.
template <typename Use>
void for_each_type(const std::vector<TableRow>& rows, const Use& use) {
  const auto use_if_there = [&](auto type) {
    if (std::any_of(rows.begin(), rows.end(),
                    [](const TableRow& row) { return row.dtype == decltype(type)::kDtype; })) {
      use(type);
    }
  };
  use_if_there(Float32{});
  use_if_there(Float64{});
  use_if_there(Float16{});
  use_if_there(BFloat16{});
}

// `rows` are those of the table; `sums` has room for one number per tile.
inline void launch_gate_penalty(const TensorTable& table, const std::vector<TableRow>& rows, bool hard, double shift,
                                double* sums, double* penalties, cudaStream_t stream) {
  constexpr int64_t kWarps = kThreads / 32;
  const int64_t blocks = blocks_for((table.tiles + kWarps - 1) / kWarps);
  if (blocks > 0) {
    for_each_type(rows, [&](auto type) {
      launch(&sum_penalties_kernel<decltype(type)>, blocks, kThreads, stream, table, hard, shift, sums);
    });
  }
  launch(&finish_penalties_kernel, std::min<int64_t>(table.size, 65535), kFinishPenaltiesThreads, stream, table, sums,
         penalties);
}

inline void launch_gate_penalty_backward(const TensorTable& table, const std::vector<TableRow>& rows,
                                         const double* grads, int64_t grad_stride, double shift,
                                         cudaStream_t stream) {
  if (table.tiles == 0) return;
  for_each_type(rows, [&](auto type) {
    launch(&penalty_gradient_kernel<decltype(type)>, blocks_for(table.tiles), kThreads, stream, table, grads,
           grad_stride, shift);
  });
}

}  // namespace
}  // namespace pyprune
