// Radix select for threshold.cu: scores as unsigned keys, a histogram of one digit, the choice of that digit.
//
// One read of the weights per digit. Histograms live in shared memory, one per block, and are added to the group's
// counters in device memory when the block's share of the group ends.
#pragma once

#include <cmath>

#include "block_loop.cuh"

namespace pyprune {
namespace {

constexpr int kDigitBits = 11;  // at most: 8 KiB of shared memory

using Count = unsigned long long;  // what CUDA adds atomically

// A group's search: `key` holds the digits found so far, `rank` how many of the keys that match them go.
struct Selection {
  uint64_t key;
  int64_t rank;
};

// The digit under search: bits [shift, shift + bits) of the key.
struct Digit {
  int shift;
  int bits;
  bool last;
};

// Score of a weight as a key. kScaled: scales[tensor * stride] multiplies, in float64 and rounded once.
template <typename Key, bool kScaled>
struct Scores {
  using KeyType = Key;
  const double* scales;
  int64_t stride;
  bool per_tensor;  // every tensor is a group of its own

  __device__ int64_t group(int32_t tensor) const { return per_tensor ? tensor : 0; }

  __device__ double scale(int32_t tensor) const {
    if constexpr (!kScaled) return 1;
    const double scale = scales[tensor * stride];
    return scale >= 0 && scale < HUGE_VAL ? scale : 0;  // NaN fails the first comparison
  }

  template <typename T>
  __device__ static Key key(typename T::Bits bits, double scale) {
    const auto value = T::value(bits);
    if constexpr (sizeof(Key) == 8) {
      const double score = kScaled ? static_cast<double>(value) * scale : static_cast<double>(value);
      return static_cast<uint64_t>(__double_as_longlong(score)) & 0x7fffffffffffffffull;
    } else {
      const float score =
          kScaled ? static_cast<float>(static_cast<double>(value) * scale) : static_cast<float>(value);
      return __float_as_uint(score) & 0x7fffffffu;
    }
  }
};

template <typename T>
__device__ inline bool is_finite(typename T::Bits bits) {
  if constexpr (sizeof(bits) == 8) {
    return (bits & 0x7ff0000000000000ull) != 0x7ff0000000000000ull;
  } else {
    return (__float_as_uint(T::value(bits)) & 0x7f800000u) != 0x7f800000u;
  }
}

// ---- histogram of one digit ----

// Counts the digit of every key that matches the selection above it; returns this thread's non-finite weights.
// Not inlined, so that each element type gets its own registers.
template <typename T, typename Scores>
__device__ __noinline__ int count_digits(const TableRow& row, const Layout* layout, const Run& run, double scale,
                                         uint64_t selected, Digit digit, uint32_t* bins) {
  using Key = typename Scores::KeyType;
  using Bits = typename T::Bits;
  const Bits* const data = static_cast<const Bits*>(row.data);
  const int top = digit.shift + digit.bits;
  const Key prefix = static_cast<Key>(selected >> top);
  const Key digit_mask = (Key{1} << digit.bits) - 1;
  int nonfinite = 0;
  const auto load = [&](auto width, int64_t at) {
    constexpr int kWidth = decltype(width)::value;
    return load_pack<kWidth>(data + (kWidth == 1 ? offsets_of(layout, at).data : at));
  };
  const auto use = [&](auto width, int64_t, const auto& pack) {
#pragma unroll
    for (int i = 0; i < decltype(width)::value; ++i) {
      const Bits bits = pack.get(i);
      const Key key = Scores::template key<T>(bits, scale);
      nonfinite += is_finite<T>(bits) ? 0 : 1;
      if (key >> top == prefix) atomicAdd(&bins[key >> digit.shift & digit_mask], 1u);
    }
  };
  visit<Bits>(make_span(data, layout == nullptr, run.begin, run.end), load, use);
  return nonfinite;
}

// Adds to histograms[group << bits | digit], and on the first pass (not null) to nonfinite[tensor].
template <typename Scores>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    histogram_kernel(TensorTable table, Scores scores, Digit digit, const Selection* selections, Count* histograms,
                     int64_t* nonfinite) {
  __shared__ uint32_t bins[1 << kDigitBits];  // a block meets fewer than 2^32 elements
  for (int bin = threadIdx.x; bin < 1 << digit.bits; bin += kThreads) bins[bin] = 0;
  __syncthreads();
  const TileRange tiles = tiles_of_block(table);
  for (int64_t tile = tiles.begin; tile < tiles.end;) {
    const Run run = run_at(table, tile, tiles.end);
    const TableRow& row = table.rows[run.tensor];
    const int64_t group = scores.group(run.tensor);
    const Layout* const layout = row.dense ? nullptr : layout_of(table, row);
    int count = 0;
    with_weight_type<sizeof(typename Scores::KeyType) == 8>(row.dtype, [&](auto type) {
      count = count_digits<decltype(type), Scores>(row, layout, run, scores.scale(run.tensor), selections[group].key,
                                                   digit, bins);
    });
    if (nonfinite != nullptr) {
      count = warp_sum(count);
      if (threadIdx.x % 32 == 0 && count != 0) atomic_add(&nonfinite[run.tensor], count);
    }
    tile = run.next_tile;
    if (scores.per_tensor || tile == tiles.end) {
      __syncthreads();
      for (int bin = threadIdx.x; bin < 1 << digit.bits; bin += kThreads) {
        if (bins[bin] != 0) atomicAdd(&histograms[(group << digit.bits) + bin], Count{bins[bin]});
        bins[bin] = 0;
      }
      __syncthreads();
    }
  }
}

// ---- scans over one block ----

// Sum of `value` over the threads before this one, and over all of them; all threads of the block must call.
struct Scan {
  int64_t before;
  int64_t total;
};

__device__ inline Scan scan_block(int64_t value) {
  __shared__ int64_t warps[32];
  const int lane = threadIdx.x % 32;
  int64_t inclusive = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t other = __shfl_up_sync(kWholeWarp, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  if (lane == 31) warps[threadIdx.x / 32] = inclusive;
  __syncthreads();
  Scan scan{inclusive - value, 0};
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) {
    if (warp < static_cast<int>(threadIdx.x) / 32) scan.before += warps[warp];
    scan.total += warps[warp];
  }
  __syncthreads();  // the next call writes again
  return scan;
}

// Finds each group's digit, and leaves the histogram zero for the next. One block per group.
__global__ void __launch_bounds__(kThreads)
    select_kernel(int64_t groups, Digit digit, Selection* selections, Count* histograms) {
  const int bins = 1 << digit.bits;
  const int share = (bins + kThreads - 1) / kThreads;
  const int first = static_cast<int>(threadIdx.x) * share;
  const int last = first + share < bins ? first + share : bins;
  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    Count* const histogram = histograms + (group << digit.bits);
    const int64_t rank = selections[group].rank;
    int64_t sum = 0;
    for (int bin = first; bin < last; ++bin) sum += static_cast<int64_t>(histogram[bin]);
    int64_t before = scan_block(sum).before;  // its barriers part the reading of rank from its writing
    for (int bin = first; bin < last; ++bin) {
      const int64_t count = static_cast<int64_t>(histogram[bin]);
      histogram[bin] = 0;
      // The one digit where the running count reaches the rank; with rank 0, digit 0, and rank stays 0.
      const bool here = rank == 0 ? bin == 0 : before < rank && rank <= before + count;
      if (here) {
        uint64_t key = selections[group].key | static_cast<uint64_t>(bin) << digit.shift;
        int64_t left = rank - before;
        if (digit.last && left == count && left > 0) {  // all ties go: no need to tell them apart
          key += 1;
          left = 0;
        }
        selections[group] = {key, left};
      }
      before += count;
    }
  }
}

}  // namespace
}  // namespace pyprune
