// The last score to go, among the candidates that a sweep has set aside, and the masks that this makes wrong.
//
// A radix select over the candidates as numbers, all different. One launch per digit, whose last block chooses.
#pragma once

#include "search.cuh"

namespace pyprune {
namespace {

constexpr int kNarrowBits = 12;       // of a digit
constexpr int kNarrowThreads = 1024;  // one block per multiprocessor: few histograms to add up

__device__ inline int64_t share_begin(int64_t count, int64_t block) {
  return count * block / static_cast<int64_t>(gridDim.x);
}

// Calls use(candidate) for the share of a block, by all its threads.
template <typename Use>
__device__ inline void for_each_candidate(const Search* search, const uint64_t* candidates, const Use& use) {
  const int64_t count = static_cast<int64_t>(search->candidates);
  visit<uint64_t>(
      make_span(candidates, true, share_begin(count, blockIdx.x), share_begin(count, blockIdx.x + 1)),
      [&](auto width, int64_t at) { return load_pack<decltype(width)::value>(candidates + at); },
      [&](auto width, int64_t, const auto& pack) {
#pragma unroll
        for (int i = 0; i < decltype(width)::value; ++i) use(pack.get(i));
      });
}

// The histogram is zero before and after.
__global__ void __launch_bounds__(kNarrowThreads)
    narrow_kernel(Search* search, const uint64_t* candidates, uint32_t* histogram) {
  constexpr int kBins = 1 << kNarrowBits;
  __shared__ uint32_t bins[kBins];
  const int open = search->open_bits, bits = open < kNarrowBits ? open : kNarrowBits, shift = open - bits;
  if (open == 0) return;
  const uint64_t prefix = search->prefix;
  const int64_t rank = search->rank;
  for (int bin = threadIdx.x; bin < kBins; bin += kNarrowThreads) bins[bin] = 0;
  __syncthreads();
  for_each_candidate(search, candidates, [&](uint64_t candidate) {
    const uint64_t digits = candidate >> shift;
    if (digits >> bits == prefix) atomicAdd(&bins[digits & ((1 << bits) - 1)], 1u);
  });
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kNarrowThreads) {
    if (bins[bin] != 0) atomicAdd(&histogram[bin], bins[bin]);
  }
  if (!is_last_block(&search->arrived)) return;
  constexpr int kShare = kBins / kNarrowThreads;
  uint32_t mine[kShare];
  int64_t sum = 0;
  for (int i = 0; i < kShare; ++i) {
    const int bin = static_cast<int>(threadIdx.x) * kShare + i;
    mine[i] = __ldcg(&histogram[bin]);
    histogram[bin] = 0;
    sum += mine[i];
  }
  int64_t before = scan_block(sum).before;
  for (int i = 0; i < kShare; ++i) {
    if (before < rank && rank <= before + mine[i]) {
      const uint64_t found = prefix << bits | (threadIdx.x * kShare + i);
      search->prefix = found;
      search->rank = rank - before;
      search->open_bits = shift;
      if (shift == 0) search->limit = found + 1;
    }
    before += mine[i];
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    patch_candidates_kernel(TensorTable table, const Search* search, const uint64_t* candidates, int position_bits) {
  if (search->missed) return;
  const uint64_t limit = search->limit, provisional = search->provisional;
  const uint64_t position_mask = (uint64_t{1} << position_bits) - 1;
  for_each_candidate(search, candidates, [&](uint64_t candidate) {
    const bool goes = candidate < limit;
    if (goes == (candidate < provisional)) return;
    const int64_t element = static_cast<int64_t>(candidate & position_mask);
    const TableRow& row = table.rows[tensor_of_element(table, element)];
    const int64_t at = offsets_of(layout_of(table, row), element - row.first_element).partner;
    static_cast<uint8_t*>(row.partner)[at] = goes ? 0 : 1;
  });
}

}  // namespace
}  // namespace pyprune
