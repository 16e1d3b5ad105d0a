// The one sweep over weights and masks: writes masks split at a bound, counts what lies where, and sets the
// candidates between two bounds aside.
//
// A warp takes a tile at a time. A lane loads 16 bytes of neighbours (32 of float64), several times before it looks
// at any, and writes as many mask bytes; a warp's masks fill whole lines. Magnitudes compare as bits, four at a time:
// the answers are the four bytes of a word, so they are a mask when stored and counters when added, and so is a base,
// whose bytes are 0 or 1: what it lacks is below everything. Candidates are
// few: they are read again, wait in shared memory until the warp has some, and are then appended to a list, in no
// order.
#pragma once

#include "scores.cuh"

namespace pyprune {
namespace {

constexpr int kWarpsPerBlock = kThreads / 32;
template <bool kAnyBased>
constexpr int kSweepBlocks = kAnyBased ? 2 : 3;  // per multiprocessor: with more, registers would not hold all loads
constexpr int kWaiting = 128;                    // candidates of a warp, of which each lane can add one at a time

template <typename Bits>
constexpr int kStep = sizeof(Bits) == 2 ? 8 : 4;  // neighbours that a lane takes at once
template <typename Bits>
constexpr int kStepsInFlight = sizeof(Bits) == 8 ? 2 : 4;
template <typename Bits>
using Limit = std::conditional_t<sizeof(Bits) == 8, uint64_t, uint32_t>;

constexpr uint32_t kFourOnes = 0x01010101;

__device__ inline int sum_of_bytes(uint32_t four) {
  return static_cast<int>(four * kFourOnes >> 24);  // below 256
}

// Byte i is 1 if element 4 * quad + i is not below `limit`. Adding what is missing from the limit to the first power
// of two that no magnitude reaches carries into the sign bit.
template <typename Bits>
__device__ inline uint32_t at_least(const Pack<Bits, kStep<Bits>>& magnitudes, int quad, Limit<Bits> limit) {
  if constexpr (sizeof(Bits) == 2) {
    const uint32_t* const words = magnitudes.words + 2 * quad;
    const uint32_t missing = (0x8000u - limit) * 0x10001u;
    return __byte_perm(words[0] + missing, words[1] + missing, 0x7531) >> 7 & kFourOnes;
  } else if constexpr (sizeof(Bits) == 4) {
    const uint32_t* const words = magnitudes.words + 4 * quad;
    const uint32_t missing = 0x80000000u - limit;
    const uint32_t low = __byte_perm(words[0] + missing, words[1] + missing, 0x0073);
    const uint32_t high = __byte_perm(words[2] + missing, words[3] + missing, 0x0073);
    return __byte_perm(low, high, 0x5410) >> 7 & kFourOnes;
  } else {
    uint32_t flags = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) flags |= (magnitudes.get(4 * quad + i) >= limit ? 1u : 0u) << 8 * i;
    return flags;
  }
}

template <typename Bits>
__device__ inline void clear_signs(Pack<Bits, kStep<Bits>>& pack) {
#pragma unroll
  for (int word = 0; word < static_cast<int>(sizeof(pack) / 4); ++word) {
    if (sizeof(Bits) == 2) pack.words[word] &= 0x7fff7fffu;
    if (sizeof(Bits) == 4 || (sizeof(Bits) == 8 && word % 2 == 1)) pack.words[word] &= 0x7fffffffu;
  }
}

// Where a sweep leaves what it finds.
struct Found {
  uint32_t* ties;      // of each tile: at the lower bound, and << 16 at the upper one
  int64_t* nonfinite;  // of each tensor; null if they have been counted
  // Null, or for the search among all tensors.
  Search* search;
  uint64_t* candidates;
  int64_t room;  // for so many
  int position_bits;
};

struct RunCounts {
  int64_t kept = 0;  // not below the bracket
  int64_t low_ties = 0, high_ties = 0;
  int64_t nonfinite = 0;
};

// All lanes of a warp call with the same run, which begins and ends where tiles do; each gets its share of the
// counts. Not inlined, so that each element type gets its own registers.
template <typename T, typename Scores, bool kBased>
__device__ __noinline__ RunCounts sweep_run(const TableRow& row, const Layout* layout, const Run& run,
                                            const Bounds& bounds, const Scores& scores, double scale, uint32_t* ties,
                                            const Found& found, uint64_t* waiting) {
  using Bits = typename T::Bits;
  using Step = Pack<Bits, kStep<Bits>>;
  constexpr int kQuads = kStep<Bits> / 4, kInFlight = kStepsInFlight<Bits>, kWarpStep = 32 * kStep<Bits>;
  const Limit<Bits> low_ties = static_cast<Limit<Bits>>(bounds.low_ties);
  const Limit<Bits> candidates = static_cast<Limit<Bits>>(bounds.candidates);
  const Limit<Bits> high_ties = static_cast<Limit<Bits>>(bounds.high_ties);
  const Limit<Bits> above = static_cast<Limit<Bits>>(bounds.above);
  const Limit<Bits> split = static_cast<Limit<Bits>>(bounds.split);
  const Bits* const data = static_cast<const Bits*>(row.data);
  uint8_t* const mask = static_cast<uint8_t*>(row.partner);
  const uint8_t* const base = row.base;
  const bool packs = layout == nullptr && reinterpret_cast<uintptr_t>(data) % sizeof(Step) == 0 &&
                     reinterpret_cast<uintptr_t>(mask) % kStep<Bits> == 0 &&
                     (!kBased || reinterpret_cast<uintptr_t>(base) % kStep<Bits> == 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  RunCounts counts;
  uint32_t kept = 0, lows = 0, highs = 0, not_finite = 0;  // of the tile, four counters each
  int in_waiting = 0;                                      // the same in all lanes

  const auto append_waiting = [&] {
    __syncwarp();
    Count begin = 0;
    if (lane == 0) begin = atomicAdd(&found.search->candidates, static_cast<Count>(in_waiting));
    begin = __shfl_sync(kWholeWarp, begin, 0);
    for (int i = lane; i < in_waiting && static_cast<int64_t>(begin) + i < found.room; i += 32) {
      const uint64_t element = static_cast<uint64_t>(row.first_element + run.begin) + (waiting[i] & 0xffffffffu);
      const uint64_t key = Scores::template key<T>(static_cast<Bits>(waiting[i] >> 32), scale) >> scores.zeros;
      found.candidates[begin + i] = (key - found.search->first_key) << found.position_bits | element;
    }
    __syncwarp();
    in_waiting = 0;
  };
  // Bit 8 * i + g of `chosen` is element i of quad g; where_of says where that lies in the run.
  const auto set_aside = [&](uint32_t chosen, const auto& where_of) {
    for (unsigned lanes; (lanes = __ballot_sync(kWholeWarp, chosen != 0)) != 0; chosen &= chosen - 1) {
      if (in_waiting > kWaiting - 32) append_waiting();
      if (chosen != 0) {
        const int bit = __ffs(static_cast<int>(chosen)) - 1;
        const int64_t at = where_of(bit % 8, bit / 8);
        const Bits magnitude = data[offsets_of(layout, run.begin + at).data] & kMagnitude<Bits>;
        waiting[in_waiting + __popc(lanes & ((1u << lane) - 1))] =
            uint64_t{magnitude} << 32 | static_cast<uint32_t>(at);
      }
      in_waiting += __popc(lanes);
    }
  };
  // Adds four elements, of which some are `there`, to the counters and, at `place`, to `chosen`; returns their masks.
  const auto take = [&](const Step& step, int quad, uint32_t there, int place, uint32_t& chosen) {
    const uint32_t from_low = at_least<Bits>(step, quad, low_ties) & there;
    const uint32_t inside = from_low & ~at_least<Bits>(step, quad, above);
    kept += from_low;
    if (inside != 0) {
      const uint32_t no_low = at_least<Bits>(step, quad, candidates), high = at_least<Bits>(step, quad, high_ties);
      lows += inside & ~no_low;
      highs += inside & high;
      chosen |= (inside & no_low & ~high) << place;
    }
    return at_least<Bits>(step, quad, split) & there;
  };
  const auto look_for_nonfinite = [&](const Step& step) {
#pragma unroll
    for (int word = 0; word < static_cast<int>(sizeof(step) / 4); ++word) {
      if (sizeof(Bits) == 2)
        not_finite |= step.words[word] + (0x8000u - static_cast<uint32_t>(T::kInfinity)) * 0x10001u;
      if (sizeof(Bits) == 4) not_finite |= step.words[word] + (0x80000000u - static_cast<uint32_t>(T::kInfinity));
      if (sizeof(Bits) == 8 && word % 2 == 1) not_finite |= step.words[word] + (0x80000000u - (T::kInfinity >> 32));
    }
  };

  for (int64_t begin = run.begin; begin < run.end; begin += kTile) {
    const int64_t end = begin + kTile < run.end ? begin + kTile : run.end;
    int64_t at = begin;
    if (packs) {
#pragma unroll 1
      for (; at + kInFlight * kWarpStep <= end; at += kInFlight * kWarpStep) {
        const int64_t first = at + lane * kStep<Bits>;
        Step steps[kInFlight];
        Pack<uint8_t, kStep<Bits>> in_base[kBased ? kInFlight : 1];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          steps[i] = load_pack<kStep<Bits>>(data + first + i * kWarpStep);
          if constexpr (kBased) in_base[i] = load_pack<kStep<Bits>>(base + first + i * kWarpStep);
        }
        keep_loads_above();
        uint32_t chosen = 0;
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          clear_signs<Bits>(steps[i]);
          look_for_nonfinite(steps[i]);
          Pack<uint8_t, kStep<Bits>> keep;
#pragma unroll
          for (int quad = 0; quad < kQuads; ++quad) {
            const uint32_t there = kBased ? in_base[kBased ? i : 0].words[quad] : kFourOnes;
            keep.words[quad] = take(steps[i], quad, there, i * kQuads + quad, chosen);
          }
          store_pack(mask + first + i * kWarpStep, keep);
        }
        if constexpr (!Scores::kWide) {
          set_aside(chosen, [&](int quad, int i) {
            return first - run.begin + quad / kQuads * kWarpStep + quad % kQuads * 4 + i;
          });
        }
      }
    }
    // The rest one by one, four to a lane: a tail, or all of a tensor with strides.
#pragma unroll 1
    for (; at < end; at += 128) {
      Step step{};
      uint32_t there = 0, chosen = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t element = at + 32 * i + lane;
        if (element >= end) continue;
        const Offsets offsets = offsets_of(layout, element);
        there |= (kBased ? uint32_t{base[offsets.partner]} : 1u) << 8 * i;
        step.set_in_zeros(i, data[offsets.data]);
      }
      clear_signs<Bits>(step);
      look_for_nonfinite(step);
      const uint32_t keep = take(step, 0, there, 0, chosen);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t element = at + 32 * i + lane;
        if (element < end) mask[offsets_of(layout, element).partner] = static_cast<uint8_t>(keep >> 8 * i & 1);
      }
      if constexpr (!Scores::kWide) {
        set_aside(chosen, [&](int, int i) { return at - run.begin + 32 * i + lane; });
      }
    }

    const int low = sum_of_bytes(lows), high = sum_of_bytes(highs);
    counts.kept += sum_of_bytes(kept);
    counts.low_ties += low;
    counts.high_ties += high;
    const uint32_t of_tile = warp_sum(static_cast<uint32_t>(low | high << 16));
    if (lane == 0) *ties = of_tile;
    ++ties;
    constexpr uint32_t kSigns = sizeof(Bits) == 2 ? 0x80008000u : 0x80000000u;
    if (__any_sync(kWholeWarp, (not_finite & kSigns) != 0)) {
      for (int64_t element = begin + lane; element < end; element += 32) {
        const uint64_t magnitude = data[offsets_of(layout, element).data] & kMagnitude<Bits>;
        counts.nonfinite += magnitude >= T::kInfinity ? 1 : 0;
      }
    }
    kept = lows = highs = not_finite = 0;
  }
  if (in_waiting > 0) append_waiting();
  return counts;
}

// With kAnyBased some rows have a base.
template <typename Scores, bool kAnyBased>
__global__ void __launch_bounds__(kThreads, kSweepBlocks<kAnyBased>)
    sweep_kernel(TensorTable table, Scores scores, const Bounds* bounds, const int* wanted, Found found,
                 int64_t elements, int64_t removed, Ties* ties) {
  if (wanted != nullptr && *wanted == 0) return;
  __shared__ uint64_t waiting[Scores::kWide ? 1 : kWarpsPerBlock][kWaiting];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  const TileRange tiles = share_of(table.tiles, static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp, warps);
  int64_t kept = 0, low_ties = 0, high_ties = 0;
  for (int64_t tile = tiles.begin; tile < tiles.end;) {
    const Run run = run_at(table, tile, tiles.end);
    const TableRow& row = table.rows[run.tensor];
    RunCounts counts;
    with_weight_type<Scores::kWide>(row.dtype, [&](auto type) {
      const auto sweep = [&](auto based) {
        counts = sweep_run<decltype(type), Scores, decltype(based)::value>(
            row, layout_of(table, row), run, bounds[run.tensor], scores, scores.scale(run.tensor), found.ties + tile,
            found, waiting[Scores::kWide ? 0 : warp]);
      };
      kAnyBased&& row.base != nullptr ? sweep(std::bool_constant<kAnyBased>{}) : sweep(std::false_type{});
    });
    kept += counts.kept;
    low_ties += counts.low_ties;
    high_ties += counts.high_ties;
    if (found.nonfinite != nullptr && counts.nonfinite != 0) {
      atomic_add(&found.nonfinite[run.tensor], counts.nonfinite);
    }
    tile = run.next_tile;
  }
  if (found.search == nullptr) return;
  Search& search = *found.search;
  const auto add = [](int64_t value, Count* counter) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0 && value != 0) atomicAdd(counter, static_cast<Count>(value));
  };
  add(kept, &search.kept);
  add(low_ties, &search.low_ties);
  add(high_ties, &search.high_ties);
  if (is_last_block(&search.arrived) && threadIdx.x == 0) decide(search, ties[0], elements, removed, found.room);
}

}  // namespace
}  // namespace pyprune
