// Scores of the units of a list of tensors, in the order of unit_order.h.
//
// A stage sums along one dimension: an item is a sum over the rows of one piece, by one thread, or by sixteen where
// the order has sixteen lanes. What a stage leaves is what the next one sums: pieces, then later dimensions. All
// tensors go through their n-th stage in one launch; most have one or two. Layout: any strides. Items are met in the
// order of memory, so that neighbouring threads read neighbours wherever units allow it; where they do not (rows that
// lie innermost), a line is used up by the next few steps. Moves per element: its own size, read once; between stages
// 16 bytes per sum.
#pragma once

#include <cmath>

#include "../../unit_order.h"
#include "../../unit_term.h"
#include "block_loop.cuh"
#include "launch.cuh"

namespace pyprune {

// How a tensor is cut in one stage.
struct UnitStage {
  const void* data;
  void* out;  // sums in float64, or scores in the last stage
  int64_t items;
  int64_t first_tile;             // of a tile's worth of threads each
  int64_t size, block, units;     // of the dimension that is summed
  int64_t rows_of_piece, pieces;  // of each unit
  int64_t behind;                 // elements of later dimensions
  int64_t row_stride;             // in memory
  double divisor;                 // 0 where units differ in size: see `counts`
  int32_t layout;                 // from items to their first element and to their sum
  int32_t counts;
  UnitTerm term;
  UnitPower of_maximum;  // what a maximum is raised to in the last stage
  double p;              // if that is another power
  Dtype dtype;
  bool by_lanes, last, wide;
};

// How many elements units have: in each dimension `block`, and the last one what is left of `size`.
struct UnitCounts {
  int64_t sizes[kMaxDims];
  int64_t blocks[kMaxDims];
  int32_t dims;
};

struct UnitTable {
  const UnitStage* stages;
  const Layout* layouts;
  const UnitCounts* counts;
  int32_t size;
  int64_t tiles;
};

namespace {

constexpr int kUnitTeam = static_cast<int>(kUnitLanes);
constexpr int kUnitLoads = 8;  // in flight per thread

struct BoolBits {
  using Bits = uint8_t;
  __device__ static float value(Bits bits) { return bits; }
};

// Not inlined: its registers would be everyone's.
__device__ __noinline__ double power(double x, double p) {
  return pow(fabs(x), p);
}

template <bool kOtherPower>
__device__ inline double term_of(const UnitTerm& term, double x) {
  if constexpr (kOtherPower) return power(x, term.p);
  if (term.power == UnitPower::kSigned) return x;
  // __dmul_rn and __dadd_rn are never contracted into one rounding.
  return term.power == UnitPower::kSquare && !term.maximum ? __dmul_rn(x, x) : fabs(x);
}

__device__ inline double join(const UnitTerm& term, double a, double b) {
  if (!term.maximum) return __dadd_rn(a, b);
  return b > a || b != b ? b : a;  // NaN if either is
}

// This lane's share of an item, whose first row lies at `data`. Not inlined, so that each type gets its own
// registers.
template <typename T, bool kOtherPower>
__device__ __noinline__ double sum_rows(const typename T::Bits* data, const UnitStage& stage, int64_t rows, int lane,
                                        int lanes) {
  double sum = stage.term.maximum ? -HUGE_VAL : 0.0;
  __builtin_assume(__isGlobal(data));
#pragma unroll 1
  for (int64_t first = lane; first < rows; first += lanes * kUnitLoads) {
    typename T::Bits values[kUnitLoads];
#pragma unroll
    for (int i = 0; i < kUnitLoads; ++i) {
      const int64_t row = first + i * lanes;
      values[i] = row < rows ? data[row * stage.row_stride] : typename T::Bits{};
    }
#pragma unroll
    for (int i = 0; i < kUnitLoads; ++i) {
      if (first + i * lanes < rows)
        sum = join(stage.term, sum, term_of<kOtherPower>(stage.term, T::value(values[i])));
    }
  }
  return sum;
}

__device__ __noinline__ double count_of(const UnitCounts& counts, int64_t unit) {
  int64_t elements = 1;
  for (int dim = counts.dims - 1; dim >= 0; --dim) {
    const int64_t units = (counts.sizes[dim] + counts.blocks[dim] - 1) / counts.blocks[dim];
    const int64_t left = counts.sizes[dim] - unit % units * counts.blocks[dim];
    elements *= left < counts.blocks[dim] ? left : counts.blocks[dim];
    unit /= units;
  }
  return static_cast<double>(elements);
}

// Every NaN is the same one, and no zero is negative.
__device__ inline void write_score(const UnitTable& table, const UnitStage& stage, int64_t at, double score) {
  if (stage.of_maximum == UnitPower::kSquare) score = __dmul_rn(score, score);
  if (stage.of_maximum == UnitPower::kOther) score = power(score, stage.p);
  if (stage.divisor != 1) {
    score = __ddiv_rn(score, stage.divisor != 0 ? stage.divisor : count_of(table.counts[stage.counts], at));
  }
  if (stage.wide) {
    static_cast<double*>(stage.out)[at] =
        score != score ? __longlong_as_double(0x7ff8000000000000) : __dadd_rn(score, 0.0);
  } else {
    static_cast<float*>(stage.out)[at] =
        score != score ? __uint_as_float(0x7fc00000) : __fadd_rn(__double2float_rn(score), 0.0f);
  }
}

__device__ inline int32_t stage_of_tile(const UnitTable& table, int64_t tile) {
  int32_t low = 0, high = table.size;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    (table.stages[middle].first_tile <= tile ? low : high) = middle;
  }
  return low;
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) sum_units_kernel(UnitTable table) {
  const TileRange tiles = share_of(table.tiles, blockIdx.x, gridDim.x);
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const UnitStage& stage = table.stages[stage_of_tile(table, tile)];
    const int lanes = stage.by_lanes ? kUnitTeam : 1, lane = threadIdx.x % lanes;
    const int64_t item = ((tile - stage.first_tile) * kThreads + threadIdx.x) / lanes;
    if (item >= stage.items) continue;  // whole teams
    const Offsets offsets = offsets_of(table.layouts + stage.layout, item);
    int64_t rows = stage.rows_of_piece;
    if (stage.pieces > 1 || stage.size % stage.block != 0) {
      const int64_t piece = offsets.partner / stage.behind, unit = piece / stage.pieces % stage.units;
      const int64_t left = stage.size - unit * stage.block;
      const int64_t whole = (left < stage.block ? left : stage.block) - piece % stage.pieces * stage.rows_of_piece;
      rows = whole < rows ? whole : rows;  // none, where a smaller unit has fewer pieces
    }
    double sum;
    const auto run = [&](auto type) {
      using T = decltype(type);
      const auto* const data = static_cast<const typename T::Bits*>(stage.data) + offsets.data;
      sum = stage.term.power == UnitPower::kOther && !stage.term.maximum
                ? sum_rows<T, true>(data, stage, rows, lane, lanes)
                : sum_rows<T, false>(data, stage, rows, lane, lanes);
    };
    if (stage.dtype == Dtype::kBool) {
      run(BoolBits{});
    } else {
      with_weight_type(stage.dtype, run);
    }
    if (stage.by_lanes) {
      const unsigned team = 0xffffu << (threadIdx.x & kUnitTeam);
      for (int half = kUnitTeam / 2; half > 0; half /= 2) {
        sum = join(stage.term, sum, __shfl_down_sync(team, sum, half, kUnitTeam));
      }
      if (lane != 0) continue;
    }
    if (stage.last) {
      write_score(table, stage, offsets.partner, sum);
    } else {
      static_cast<double*>(stage.out)[offsets.partner] = sum;
    }
  }
}

inline void launch_sum_units(const UnitTable& table, cudaStream_t stream) {
  if (table.tiles > 0) launch(&sum_units_kernel, blocks_for(table.tiles), kThreads, stream, table);
}

}  // namespace
}  // namespace pyprune
