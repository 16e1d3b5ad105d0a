// Radix select of the last score to go, for each group of tensors: a histogram of one digit of the keys that match so
// far, then the choice of that digit, from the top down. One read of the weights per digit.
//
// Histograms live in shared memory, one per block, and are added to the group's counters in device memory when the
// block's share of the group ends.
#pragma once

#include "scores.cuh"

namespace pyprune {
namespace {

constexpr int kDigitBits = 11;  // at most: 8 KiB of shared memory

// The digit under search: bits [shift, shift + bits) of the key.
struct Digit {
  int shift;
  int bits;
  bool first;
  bool last;
};

// Counts the digit of every key that matches the group's digits above it, and returns how many the base lacks, which
// have none.
// Not inlined, so that each element type gets its own registers.
template <typename T, typename Scores, bool kBased>
__device__ __noinline__ int64_t count_digits(const TableRow& row, const Layout* layout, const Run& run, double scale,
                                             uint64_t found, Digit digit, uint32_t* bins) {
  using Key = typename Scores::KeyType;
  using Bits = typename T::Bits;
  const Bits* const data = static_cast<const Bits*>(row.data);
  const int top = digit.shift + digit.bits;
  const Key prefix = static_cast<Key>(found >> top);
  const Key digit_mask = (Key{1} << digit.bits) - 1;
  int64_t lacking = 0;
  const auto count = [&](Bits bits) {
    const Key key = Scores::template key<T>(bits, scale);
    if (key >> top == prefix) atomicAdd(&bins[key >> digit.shift & digit_mask], 1u);
  };
  if constexpr (kBased) {
    const auto load = [&](auto width, int64_t at) {
      constexpr int kWidth = decltype(width)::value;
      const Offsets offsets = kWidth == 1 ? offsets_of(layout, at) : Offsets{at, at};
      struct {
        Pack<Bits, kWidth> weights;
        Pack<uint8_t, kWidth> base;
      } both{load_pack<kWidth>(data + offsets.data), load_pack<kWidth>(row.base + offsets.partner)};
      return both;
    };
    const auto use = [&](auto width, int64_t, const auto& both) {
#pragma unroll
      for (int i = 0; i < decltype(width)::value; ++i) {
        if (both.base.get(i) != 0) {
          count(both.weights.get(i));
        } else {
          ++lacking;
        }
      }
    };
    visit<Bits>(make_span(data, row.base, layout == nullptr, run.begin, run.end), load, use);
  } else {
    const auto load = [&](auto width, int64_t at) {
      constexpr int kWidth = decltype(width)::value;
      return load_pack<kWidth>(data + (kWidth == 1 ? offsets_of(layout, at).data : at));
    };
    const auto use = [&](auto width, int64_t, const auto& pack) {
#pragma unroll
      for (int i = 0; i < decltype(width)::value; ++i) count(pack.get(i));
    };
    visit<Bits>(make_span(data, layout == nullptr, run.begin, run.end), load, use);
  }
  return lacking;
}

// Adds to histograms[group << bits | digit] and, with the first digit, to lacking[group]. With kAnyBased some rows
// have a base.
template <typename Scores, bool kAnyBased>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    histogram_kernel(TensorTable table, Scores scores, Digit digit, const int* wanted, const Ties* ties,
                     Count* histograms, int64_t* lacking) {
  if (wanted != nullptr && *wanted == 0) return;
  __shared__ uint32_t bins[1 << kDigitBits];  // a block meets fewer than 2^32 elements
  for (int bin = threadIdx.x; bin < 1 << digit.bits; bin += kThreads) bins[bin] = 0;
  __syncthreads();
  const TileRange tiles = tiles_of_block(table);
  for (int64_t tile = tiles.begin; tile < tiles.end;) {
    const Run run = run_at(table, tile, tiles.end);
    const TableRow& row = table.rows[run.tensor];
    const int64_t group = scores.group(run.tensor);
    const bool based = kAnyBased && row.base != nullptr;
    const Layout* const layout = row.dense && !based ? nullptr : layout_of(table, row);
    int64_t lacks = 0;
    with_weight_type<Scores::kWide>(row.dtype, [&](auto type) {
      const auto count = [&](auto has_base) {
        lacks = count_digits<decltype(type), Scores, decltype(has_base)::value>(
            row, layout, run, scores.scale(run.tensor), ties[group].key, digit, bins);
      };
      based ? count(std::bool_constant<kAnyBased>{}) : count(std::false_type{});
    });
    if (based && digit.first) add_block_total(lacks, &lacking[group]);
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

// Finds each group's digit, and leaves the histogram zero for the next; after the last digit, the bounds of the
// group's tensors. What bases lack goes before all that has digits. One block per group.
template <typename Scores>
__global__ void __launch_bounds__(kThreads)
    select_kernel(TensorTable table, Scores scores, int64_t groups, Digit digit, const int* wanted, Ties* ties,
                  Count* histograms, const int64_t* lacking, Bounds* bounds) {
  if (wanted != nullptr && *wanted == 0) return;
  const int bins = 1 << digit.bits;
  const int share = (bins + kThreads - 1) / kThreads;
  const int first = static_cast<int>(threadIdx.x) * share;
  const int last = first + share < bins ? first + share : bins;
  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    Count* const histogram = histograms + (group << digit.bits);
    int64_t going = ties[group].going;
    if (digit.first) going = going > lacking[group] ? going - lacking[group] : 0;
    int64_t sum = 0;
    for (int bin = first; bin < last; ++bin) sum += static_cast<int64_t>(histogram[bin]);
    int64_t before = scan_block(sum).before;  // its barriers part the reading of `going` from its writing
    for (int bin = first; bin < last; ++bin) {
      const int64_t count = static_cast<int64_t>(histogram[bin]);
      histogram[bin] = 0;
      // The one digit where the running count reaches what goes; if nothing goes, digit 0, and it stays nothing.
      const bool here = going == 0 ? bin == 0 : before < going && going <= before + count;
      if (here) {
        uint64_t key = ties[group].key | static_cast<uint64_t>(bin) << digit.shift;
        int64_t left = going - before;
        if (digit.last && left == count && left > 0) {  // all ties go: no need to tell them apart
          key += 1;
          left = 0;
        }
        ties[group] = {key, left, 0, false, left == 0};
      }
      before += count;
    }
    if (!digit.last) continue;
    __syncthreads();
    const uint64_t key = ties[group].key, after = key + (ties[group].going > 0 ? 1 : 0);
    const int32_t end = scores.per_tensor ? static_cast<int32_t>(group) + 1 : table.size;
    for (int32_t tensor = (scores.per_tensor ? static_cast<int32_t>(group) : 0) + static_cast<int32_t>(threadIdx.x);
         tensor < end; tensor += kThreads) {
      const Dtype dtype = table.rows[tensor].dtype;
      const double scale = scores.scale(tensor);
      const uint64_t from = scores.first_from(dtype, key, scale), to = scores.first_from(dtype, after, scale);
      bounds[tensor] = {from, to, to, to, from};
    }
  }
}

}  // namespace
}  // namespace pyprune
