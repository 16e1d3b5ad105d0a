// masks[i] = keep, where exactly the removed[g] smallest scores of group g are dropped: |w| or |w| * scales[i].
//
// Among all tensors, as on the CPU:
//   1. A stratified sample gives a bracket that holds the last score to go, with high probability (bracket.cuh).
//   2. One sweep over the weights counts what is below, writes provisional masks, split in the middle of the bracket,
//      and sets aside the candidates inside it (sweep.cuh). A score at an end of the bracket that very many weights
//      share is not set aside, but counted per tile of 4096.
//   3. The last score to go is selected among the candidates, ties by (tensor, index), and the masks between it and
//      the middle are corrected (candidates.cuh); or ties of a crowd are, tile by tile (ties.cuh).
// If the bracket missed, which happens once in 2000 calls, or candidates did not fit, a flag lets the kernels of
// the radix select run, which otherwise return at once: three reads of the weights give the last score to go, and
// another sweep writes the masks. The same is done from the start where every tensor competes for itself, and for
// lists with float64.
//
// What a base lacks goes before all scores: the sample takes it for the lowest score, the sweep counts it as below
// the bracket, and the radix select leaves it out. A base is one byte more to read per element, each time the weights
// are.
//
// Moves per element of b bytes: b + 1, and about a tenth of that for the sample and the candidates (of 1e9 weights
// 0.9 % are candidates, 8 bytes each, written once and read 5 times); plus b for each element of a tile that is
// settled. By radix select alone: (digits + 1) * b + 1 with 3 digits for float32 (or with scales), 2 for half types,
// 6 for float64.
//
// Launches among all tensors: 19 in float32, 15 in bfloat16, of which half return at once; and one per 72 tensors for
// their table. Memory: 8 bytes for each candidate that there is room for, 2 % of 1e9 weights, 5 % of 25e6.
//
// For half types one histogram of all 2^15 keys would do instead of a sample. But it reads the weights twice, 5 bytes
// instead of 3, and an atomic per weight in shared memory takes longer than reading it.
//
// Counters are integers, and candidates are all different: the masks are the same bits in every run.
#pragma once

#include <bit>
#include <cmath>

#include "bracket.cuh"
#include "candidates.cuh"
#include "launch.cuh"
#include "radix_select.cuh"
#include "sweep.cuh"
#include "ties.cuh"

namespace pyprune {
namespace {

constexpr int64_t kHistogramBudget = int64_t{8} << 20;  // bytes for all groups, or 1 % of the weights
constexpr double kSpread = 3.5;                         // half-width of the bracket, in standard deviations
constexpr int kMostPositionBits = 33;                   // beside a key of 31 bits

// What a call takes, as the shapes and dtypes decide it.
struct ThresholdPlan {
  int64_t elements = 0, groups, removed;
  bool scaled, wide = false, based = false;
  int zeros = 16;  // low bits of a float32 key: bfloat16 leaves 16 zero, float16 13
  int digit_bits = kDigitBits;
  bool sampled;
  int position_bits;
  SampleRanks ranks{0, 0, 0, 0, 0};
  int64_t room = 0;  // for candidates

  // `shift` moves the bracket by so many standard deviations, so that it misses: for tests and benchmarks.
  ThresholdPlan(const std::vector<TableRow>& rows, const std::vector<int64_t>& removed_of, bool scaled_,
                double shift = 0)
      : groups(static_cast<int64_t>(removed_of.size())), removed(removed_of[0]), scaled(scaled_) {
    int64_t bytes = 0;
    for (const TableRow& row : rows) {
      elements += row.numel;
      bytes += row.numel * item_size(row.dtype);
      wide = wide || row.dtype == Dtype::kFloat64;
      based = based || row.base != nullptr;
      if (row.dtype != Dtype::kBFloat16) zeros = std::min(zeros, row.dtype == Dtype::kFloat16 ? 13 : 0);
    }
    if (wide || scaled) zeros = 0;
    const int64_t budget = std::max(kHistogramBudget, bytes / 100);
    while (digit_bits > 4 && groups * static_cast<int64_t>(sizeof(Count)) << digit_bits > budget) --digit_bits;
    position_bits = std::max(1, static_cast<int>(std::bit_width(static_cast<uint64_t>(elements))));
    sampled = groups == 1 && !wide && position_bits <= kMostPositionBits;
    if (sampled && 0 < removed && removed < elements) place_bracket(shift);
  }

  int key_bits() const { return wide ? 63 : 31; }
  int narrow_launches() const { return (key_bits() - zeros + position_bits + kNarrowBits - 1) / kNarrowBits; }

 private:
  void place_bracket(double shift) {
    const double count = static_cast<double>(elements), part = static_cast<double>(removed) / count;
    // A larger sample takes longer, but leaves fewer candidates: this size balances the two.
    ranks.size = std::min(elements, static_cast<int64_t>(std::pow(count, 2.0 / 3.0) / 8) + 512);
    const double size = static_cast<double>(ranks.size), sigma = std::sqrt(size * part * (1 - part));
    const double half = kSpread * sigma + 1, center = size * part + shift * sigma;
    ranks.first = std::min(static_cast<int64_t>(std::floor(center - half)), ranks.size - 1);
    ranks.middle = std::min(static_cast<int64_t>(size * part), ranks.size - 1);
    ranks.last = std::max<int64_t>(static_cast<int64_t>(std::ceil(center + half)), 0);
    const double expected = count * (2.6 * half / size + 0.01) + 4096;
    room = std::min(elements, static_cast<int64_t>(expected));
    ranks.budget = static_cast<int64_t>(static_cast<double>(room) / 1.2 / count * size);
  }
};

// Device memory of a call; what is zero at the start comes first.
struct ThresholdMemory {
  Search* search;
  Count* histograms;
  int64_t* lacking;  // of each group: what its bases lack
  uint32_t* narrow_histogram;
  Ties* ties;
  Bounds* bounds;
  uint32_t* sample;
  uint64_t* candidates;
  uint32_t* tile_ties;
  int64_t zero_bytes, bytes;

  ThresholdMemory(const ThresholdPlan& plan, const TensorTable& table, char* base = nullptr) {
    int64_t used = 0;
    const auto take = [&]<class Item>(Item*& items, int64_t count) {
      items = reinterpret_cast<Item*>(base + used);
      used += (count * static_cast<int64_t>(sizeof(Item)) + 255) / 256 * 256;
    };
    take(search, 1);
    take(histograms, plan.groups << plan.digit_bits);
    take(lacking, plan.groups);
    take(narrow_histogram, plan.sampled ? 1 << kNarrowBits : 0);
    zero_bytes = used;
    take(ties, plan.groups);
    take(bounds, table.size);
    take(sample, plan.ranks.size);
    take(candidates, plan.room);
    take(tile_ties, table.tiles);
    bytes = used;
  }
};

template <typename Scores>
class ThresholdLaunches {
 public:
  ThresholdLaunches(const TensorTable& table, const Scores& scores, const ThresholdPlan& plan,
                    const ThresholdMemory& memory, int64_t* nonfinite, cudaStream_t stream)
      : table_(table),
        scores_(scores),
        plan_(plan),
        memory_(memory),
        nonfinite_(nonfinite),
        stream_(stream),
        blocks_(blocks_for(table.tiles)) {}

  void run() const {
    if constexpr (!Scores::kWide) {
      if (plan_.sampled) {
        sample();
        if (plan_.ranks.size > 0) {
          select_candidates();
          radix_select(&memory_.search->missed);
          sweep(&memory_.search->missed, nullptr, nullptr);
          settle_ties();
        }
        return;
      }
    }
    radix_select(nullptr);
    sweep(nullptr, nullptr, nonfinite_);
    settle_ties();
  }

 private:
  void sample() const {
    const int64_t size = plan_.ranks.size;
    if (size > 0) {
      launch(&sample_kernel<Scores>, (size + kThreads - 1) / kThreads, kThreads, stream_, table_, scores_,
             plan_.elements, size, memory_.sample);
    }
    launch(&bracket_kernel<Scores>, 1, kBracketThreads, stream_, table_, scores_, plan_.ranks, plan_.removed,
           plan_.position_bits, memory_.sample, memory_.search, memory_.ties, memory_.bounds);
    sweep(nullptr, memory_.search, nonfinite_);
  }

  void select_candidates() const {
    for (int i = 0; i < plan_.narrow_launches(); ++i) {
      launch(&narrow_kernel, multiprocessors(), kNarrowThreads, stream_, memory_.search, memory_.candidates,
             memory_.narrow_histogram);
    }
    launch(&patch_candidates_kernel, blocks_, kThreads, stream_, table_, memory_.search, memory_.candidates,
           plan_.position_bits);
  }

  // With `wanted`, these kernels return at once where it is zero.
  void radix_select(const int* wanted) const {
    for (int top = plan_.key_bits(); top > plan_.zeros;) {
      const int bits = std::min(plan_.digit_bits, top - plan_.zeros);
      top -= bits;
      const Digit digit{top, bits, top + bits == plan_.key_bits(), top == plan_.zeros};
      const auto histogram = plan_.based ? &histogram_kernel<Scores, true> : &histogram_kernel<Scores, false>;
      launch(histogram, blocks_, kThreads, stream_, table_, scores_, digit, wanted, memory_.ties, memory_.histograms,
             memory_.lacking);
      launch(&select_kernel<Scores>, group_blocks(), kThreads, stream_, table_, scores_, plan_.groups, digit, wanted,
             memory_.ties, memory_.histograms, memory_.lacking, memory_.bounds);
    }
  }

  void sweep(const int* wanted, Search* search, int64_t* nonfinite) const {
    const Found found{memory_.tile_ties, nonfinite, search, memory_.candidates, plan_.room, plan_.position_bits};
    const auto kernel = plan_.based ? &sweep_kernel<Scores, true> : &sweep_kernel<Scores, false>;
    const int per_multiprocessor = plan_.based ? kSweepBlocks<true> : kSweepBlocks<false>;
    launch(kernel, blocks_for(table_.tiles, per_multiprocessor), kThreads, stream_, table_, scores_, memory_.bounds,
           wanted, found, plan_.elements, plan_.removed, memory_.ties);
  }

  void settle_ties() const {
    launch(&scan_ties_kernel, group_blocks(), kScanThreads, stream_, table_, scores_.per_tensor, memory_.ties,
           memory_.tile_ties);
    launch(&settle_ties_kernel<Scores>, blocks_, kThreads, stream_, table_, scores_, memory_.ties, memory_.tile_ties);
  }

  int64_t group_blocks() const { return std::min<int64_t>(plan_.groups, 65535); }

  const TensorTable& table_;
  const Scores& scores_;
  const ThresholdPlan& plan_;
  const ThresholdMemory& memory_;
  int64_t* nonfinite_;
  cudaStream_t stream_;
  int64_t blocks_;
};

// Writes the partners of all rows. `nonfinite`, one number per tensor, is zero at the start; `scales` may be null.
inline void launch_threshold(const TensorTable& table, const ThresholdPlan& plan, const ThresholdMemory& memory,
                             const std::vector<int64_t>& removed, const double* scales, int64_t scale_stride,
                             int64_t* nonfinite, cudaStream_t stream) {
  if (table.tiles == 0) return;
  fill_zero(reinterpret_cast<char*>(memory.search), memory.zero_bytes, stream);
  if (!plan.sampled) {
    std::vector<Ties> start;
    for (const int64_t going : removed) start.push_back({0, going, 0, false, false});
    upload(start, memory.ties, stream);
  }
  const auto run = [&]<typename Scores>(Scores scores) {
    ThresholdLaunches<Scores>(table, scores, plan, memory, nonfinite, stream).run();
  };
  const bool per_tensor = plan.groups == table.size;  // for a single tensor both mean the same
  if (plan.wide) {
    scales == nullptr ? run(Scores<uint64_t, false>{scales, scale_stride, per_tensor, 0})
                      : run(Scores<uint64_t, true>{scales, scale_stride, per_tensor, 0});
  } else {
    scales == nullptr ? run(Scores<uint32_t, false>{scales, scale_stride, per_tensor, plan.zeros})
                      : run(Scores<uint32_t, true>{scales, scale_stride, per_tensor, plan.zeros});
  }
}

}  // namespace
}  // namespace pyprune
