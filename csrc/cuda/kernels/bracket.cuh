// Where to look for the last score to go: a bracket of scores that holds it with high probability, from a sample.
#pragma once

#include "../../philox.h"
#include "scores.cuh"

namespace pyprune {
namespace {

constexpr int kBracketThreads = 1024;
constexpr uint64_t kSampleSeed = 0x70797072756e65;  // any: the same weights must give the same sample

// Ranks in a sample of `size` keys, counted from zero. first < 0: from the lowest score there is; last >= size: up to
// the highest.
struct SampleRanks {
  int64_t size;  // 0: nothing competes, all go or all stay
  int64_t first, middle, last;
  int64_t budget;  // so many of the sample may be candidates
};

// One element of each of equal strata of the list; where in the stratum must not follow a pattern of the weights.
template <typename Scores>
__global__ void __launch_bounds__(kThreads)
    sample_kernel(TensorTable table, Scores scores, int64_t elements, int64_t size, uint32_t* sample) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  const int64_t whole = elements / size, rest = elements % size;
  const int64_t begin = i * whole + i * rest / size, end = (i + 1) * whole + (i + 1) * rest / size;
  const uint64_t random = philox(kSampleSeed, 0, static_cast<uint64_t>(i)).words[0];
  const int64_t element = begin + static_cast<int64_t>(random * static_cast<uint64_t>(end - begin) >> 32);
  const int32_t tensor = tensor_of_element(table, element);
  const TableRow& row = table.rows[tensor];
  const Offsets at = offsets_of(layout_of(table, row), element - row.first_element);
  if (row.base != nullptr && row.base[at.partner] == 0) {
    sample[i] = 0;  // the lowest key there is: what a base lacks goes before all scores
    return;
  }
  with_weight_type<false>(row.dtype, [&](auto type) {
    using T = decltype(type);
    sample[i] =
        Scores::template key<T>(static_cast<const typename T::Bits*>(row.data)[at.data], scores.scale(tensor)) >>
        scores.zeros;
  });
}

// The key of a rank, how many of the sample are below it, and how many are the same.
struct Ranked {
  uint32_t key;
  int64_t below, same;
};

// Radix select of three ranks at once by one block.
__device__ inline void select_ranks(const uint32_t* sample, int64_t size, int key_bits, const int64_t (&ranks)[3],
                                    Ranked (&found)[3]) {
  constexpr int kBins = 1 << 11;
  __shared__ uint32_t bins[3][kBins];
  for (int rank = threadIdx.x; rank < 3; rank += kBracketThreads) found[rank] = {0, 0, size};
  for (int top = key_bits; top > 0;) {
    const int bits = top < 11 ? top : 11;
    for (int bin = threadIdx.x; bin < 3 * kBins; bin += kBracketThreads) bins[bin / kBins][bin % kBins] = 0;
    __syncthreads();
    const uint32_t prefix[3] = {found[0].key, found[1].key, found[2].key};
    // Ranks with one prefix share its histogram.
    const bool second = prefix[1] != prefix[0], third = prefix[2] != prefix[1];
    const int table_of[3] = {0, second ? 1 : 0, third ? 2 : second ? 1 : 0};
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < size; i += kBracketThreads) {
      const uint32_t key = sample[i], digit = key >> (top - bits) & (kBins - 1) >> (11 - bits);
      const uint32_t above = top < 32 ? key >> top : 0;
      if (above == prefix[0]) atomicAdd(&bins[0][digit], 1u);
      if (second && above == prefix[1]) atomicAdd(&bins[1][digit], 1u);
      if (third && above == prefix[2]) atomicAdd(&bins[2][digit], 1u);
    }
    top -= bits;
    __syncthreads();
    for (int rank = 0; rank < 3; ++rank) {
      constexpr int kShare = kBins / kBracketThreads;
      const uint32_t* const mine = bins[table_of[rank]] + threadIdx.x * kShare;
      int64_t sum = 0;
      for (int i = 0; i < kShare; ++i) sum += mine[i];
      const Ranked last = found[rank];
      int64_t below = last.below + scan_block(sum).before;  // its barriers part reading `last` from writing
      for (int i = 0; i < kShare; ++i) {
        if (below <= ranks[rank] && ranks[rank] < below + mine[i]) {
          found[rank] = {prefix[rank] << bits | (threadIdx.x * kShare + i), below, mine[i]};
        }
        below += mine[i];
      }
    }
    __syncthreads();
  }
}

// The bracket in keys without their zeros, and which of its ends are crowds.
struct Bracket {
  uint64_t low, middle, high;
  bool low_crowd, high_crowd;
};

// An end that very many weights share would make all of them candidates: those are counted per tile instead. What
// lies between the ends is never more than the ranks say.
__device__ inline Bracket bracket_of(const SampleRanks& ranks, const Ranked (&found)[3], uint64_t infinity) {
  const bool from_lowest = ranks.first < 0, to_highest = ranks.last >= ranks.size;
  Bracket bracket{from_lowest ? 0 : found[0].key, found[1].key, to_highest ? infinity : found[2].key, false, false};
  // Only a bracket that was shifted on purpose is not around the middle.
  if (bracket.middle < bracket.low) bracket.middle = bracket.low;
  if (bracket.middle > bracket.high) bracket.middle = bracket.high;
  int64_t low = from_lowest && found[0].key != 0 ? 0 : found[0].same, high = to_highest ? 0 : found[2].same;
  int64_t expected = to_highest ? ranks.size - found[0].below : found[2].below + found[2].same - found[0].below;
  if (bracket.low == bracket.high) high = 0;  // one score, all of it in `low`
  const bool low_first = low >= high;
  for (const bool take_low : {low_first, !low_first}) {
    if (expected <= ranks.budget) break;
    if (take_low) {
      bracket.low_crowd = true;
      expected -= low;
    } else if (bracket.low != bracket.high) {
      bracket.high_crowd = true;
      expected -= high;
    }
  }
  return bracket;
}

// The bracket, the bounds of all tensors, and the start of the search. One block.
template <typename Scores>
__global__ void __launch_bounds__(kBracketThreads)
    bracket_kernel(TensorTable table, Scores scores, SampleRanks ranks, int64_t removed, int position_bits,
                   const uint32_t* sample, Search* search, Ties* ties, Bounds* bounds) {
  __shared__ Ranked found[3];
  __shared__ uint64_t keys[5];  // where the classes begin, as in Bounds
  if (ranks.size > 0) {
    const int64_t clamped[3] = {ranks.first < 0 ? 0 : ranks.first, ranks.middle,
                                ranks.last < ranks.size ? ranks.last : ranks.size - 1};
    select_ranks(sample, ranks.size, Scores::kKeyBits - scores.zeros, clamped, found);
  }
  if (threadIdx.x == 0) {
    ties[0] = {0, removed, 0, false, false};  // where the radix select starts, should it be needed
    if (ranks.size == 0) {
      for (uint64_t& key : keys) key = removed == 0 ? 0 : Scores::kAboveAll;
    } else {
      const Bracket bracket = bracket_of(ranks, found, Scores::kInfinity >> scores.zeros);
      const uint64_t after_low = bracket.low + (bracket.low_crowd ? 1 : 0);
      const uint64_t after = bracket.high + 1, high = bracket.high_crowd ? bracket.high : after;
      // A crowd at the low end is dropped provisionally, one at the high end kept: one at most is then wrong.
      uint64_t split = bracket.middle + 1;
      if (bracket.high_crowd && split > high) split = high;
      const uint64_t starts[5] = {bracket.low, after_low, high, after, split};
      for (int i = 0; i < 5; ++i) keys[i] = starts[i] << scores.zeros;
      search->first_key = bracket.low;
      search->low_key = bracket.low << scores.zeros;
      search->high_key = bracket.high << scores.zeros;
      search->provisional = (split - bracket.low) << position_bits;
      search->candidate_bits = position_bits + 64 - __clzll(static_cast<long long>(after - 1 - bracket.low));
    }
  }
  __syncthreads();
  for (int32_t tensor = threadIdx.x; tensor < table.size; tensor += kBracketThreads) {
    const Dtype dtype = table.rows[tensor].dtype;
    const double scale = scores.scale(tensor);
    uint64_t starts[5];
    for (int i = 0; i < 5; ++i) starts[i] = scores.first_from(dtype, keys[i], scale);
    bounds[tensor] = {starts[0], starts[1], starts[2], starts[3], starts[4]};
  }
}

}  // namespace
}  // namespace pyprune
