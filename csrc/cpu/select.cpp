// How the k smallest scores are found while the weights are read once:
//
//   1. A stratified sample of the scores gives a bracket that holds the k-th with high probability.
//   2. One sweep over all weights counts what lies below the bracket, sets aside the few candidates inside it, and
//      writes provisional masks, split in its middle. If the counts show that the bracket missed, they bound the k-th
//      score from one side, and the sweep is repeated: always exact, hardly ever slow.
//   3. The k-th score is selected among the candidates, and the few masks between it and the middle are corrected.
//      Of equal scores the first in the order of the list go.
//
// A bracket can be one score wide, when many weights share it (half types, weights that are already zero). Then
// nothing is set aside: the counts per chunk say which chunks lose all of it, and one chunk is walked.
#include "select.h"

#include <algorithm>
#include <numeric>

#include "arena.h"
#include "bracket.h"
#include "candidates.h"
#include "capability.h"
#include "kernels/threshold.h"
#include "parallel.h"

namespace pyprune {
namespace {

// What a thread needs to itself.
struct Worker {
  Arena bits, positions;
  std::vector<uint64_t> weight_room, mask_room;  // for weights and masks that are not contiguous
};

// What a sweep found in a chunk.
struct ChunkResult {
  int64_t above = 0;
  int64_t candidates = 0;
  int64_t nonfinite = 0;
  const void* bits = nullptr;
  const uint16_t* positions = nullptr;
};

Sweep sweep(const uint16_t* x, uint8_t* mask, int64_t n, int64_t low, int64_t middle, int64_t high, uint16_t* bits,
            uint16_t* at) {
  return PYPRUNE_KERNEL(sweep16)(x, mask, n, low, middle, high, bits, at);
}
Sweep sweep(const uint32_t* x, uint8_t* mask, int64_t n, int64_t low, int64_t middle, int64_t high, uint32_t* bits,
            uint16_t* at) {
  return PYPRUNE_KERNEL(sweep32)(x, mask, n, low, middle, high, bits, at);
}
Sweep sweep(const uint64_t* x, uint8_t* mask, int64_t n, int64_t low, int64_t middle, int64_t high, uint64_t* bits,
            uint16_t* at) {
  return PYPRUNE_KERNEL(sweep64)(x, mask, n, low, middle, high, bits, at);
}

std::vector<Score> scores_of(const Competition& competition) {
  const bool scaled = !competition.scales.empty();
  std::vector<Score> scores;
  for (size_t i = 0; i < competition.weights.size(); ++i) {
    const double scale = scaled ? competition.scales[i] : 1.0;
    scores.push_back({competition.weights[i].dtype, scaled, competition.wide, scale});
  }
  return scores;
}

class Selection {
 public:
  explicit Selection(const Competition& competition)
      : weights_(competition.weights),
        masks_(competition.masks),
        scores_(scores_of(competition)),
        removed_(competition.removed),
        chunks_(chunks_of(competition.weights)),
        results_(chunks_.size()),
        workers_(chunks_.size() > 1 ? thread_count() : 1) {}

  std::vector<int64_t> run() {
    const int64_t total = std::accumulate(weights_.begin(), weights_.end(), int64_t{0},
                                          [](int64_t sum, const Strided& weight) { return sum + weight.numel; });
    if (removed_ == 0 || removed_ == total) {
      // Nothing competes: one sweep writes the masks, and looks for what is not finite.
      const int64_t bound = removed_ == 0 ? -1 : INT64_MAX;
      sweep_all({bound, bound, bound});
      return nonfinite();
    }
    BracketSearch search(weights_, scores_, removed_);
    for (;;) {
      const Bracket bracket = search.next();
      const auto [above, inside] = sweep_all(bracket);
      const std::vector<int64_t> bad = nonfinite();
      if (std::ranges::any_of(bad, [](int64_t count) { return count > 0; })) {
        return bad;
      }
      const int64_t going = removed_ - (total - above);  // how many of the candidates
      if (going <= 0) {
        search.too_high(bracket);
      } else if (going > inside) {
        search.too_low(bracket);
      } else if (bracket.one_score()) {
        patch_equals(bracket, going);
        return bad;
      } else {
        patch_candidates(bracket, going, inside);
        return bad;
      }
    }
  }

 private:
  // ---- the sweep ----

  struct Counts {
    int64_t above, inside;
  };

  Counts sweep_all(Bracket bracket) {
    std::vector<Bracket> bits;
    for (const Score& score : scores_) {
      bits.push_back(
          {score.bits_up_to(bracket.below), score.bits_up_to(bracket.middle), score.bits_up_to(bracket.last)});
    }
    for (Worker& worker : workers_) {
      worker.bits.clear();
      worker.positions.clear();
    }
    const bool store = bracket.last - bracket.below > 1;
    share_tasks(static_cast<int64_t>(chunks_.size()), [&](int64_t task, int64_t worker) {
      results_[task] = sweep_chunk(chunks_[task], workers_[worker], bits[chunks_[task].tensor], store);
    });
    Counts counts{0, 0};
    for (const ChunkResult& result : results_) {
      counts.above += result.above;
      counts.inside += result.candidates;
    }
    return counts;
  }

  // With the bracket in bits of the chunk's weight.
  ChunkResult sweep_chunk(const Chunk& chunk, Worker& worker, Bracket bracket, bool store) {
    ChunkResult result;
    with_runs(chunk, worker, [&]<class T>(const T* x, uint8_t* mask) {
      T* bits = nullptr;
      uint16_t* positions = nullptr;
      if (store) {
        bits = reinterpret_cast<T*>(worker.bits.reserve((chunk.count + 1) * sizeof(T)));
        positions = reinterpret_cast<uint16_t*>(worker.positions.reserve((chunk.count + 1) * sizeof(uint16_t)));
      }
      const Sweep swept = sweep(x, mask, chunk.count, bracket.below, bracket.middle, bracket.last, bits, positions);
      if (store) {
        worker.bits.keep(swept.candidates * sizeof(T));
        worker.positions.keep(swept.candidates * sizeof(uint16_t));
      }
      result = {swept.above, swept.candidates, 0, bits, positions};
      const uint64_t infinity = infinity_bits(weights_[chunk.tensor].dtype);
      if (swept.largest >= infinity) {
        result.nonfinite =
            std::count_if(x, x + chunk.count, [=](T bits) { return (bits & kMagnitude<T>) >= infinity; });
      }
    });
    return result;
  }

  // Calls visit with contiguous runs of the chunk's weight bits and of its mask, which it may overwrite.
  template <class Visit>
  void with_runs(const Chunk& chunk, Worker& worker, const Visit& visit) {
    const Strided &weight = weights_[chunk.tensor], &mask = masks_[chunk.tensor];
    const char* row = weight.in_a_row(chunk.start, chunk.count, worker.weight_room);
    char* mask_row = mask.in_a_row(chunk.start, chunk.count, worker.mask_room);
    by_bits(weight.dtype,
            [&]<class T>(T) { visit(reinterpret_cast<const T*>(row), reinterpret_cast<uint8_t*>(mask_row)); });
    if (!mask.contiguous()) {
      mask.scatter(chunk.start, chunk.count, mask_row);
    }
  }

  std::vector<int64_t> nonfinite() const {
    std::vector<int64_t> counts(weights_.size());
    for (size_t i = 0; i < chunks_.size(); ++i) {
      counts[chunks_[i].tensor] += results_[i].nonfinite;
    }
    return counts;
  }

  // ---- the candidates ----

  // Calls visit(bits, mask byte) for the candidates of a chunk, in order.
  template <class Visit>
  void for_each_mask(int64_t task, Visit visit) const {
    const ChunkResult& result = results_[task];
    const Chunk& chunk = chunks_[task];
    const Strided& mask = masks_[chunk.tensor];
    uint8_t* data = reinterpret_cast<uint8_t*>(mask.data);
    const bool flat = mask.contiguous();
    by_bits(weights_[chunk.tensor].dtype, [&]<class T>(T) {
      const T* bits = static_cast<const T*>(result.bits);
      for (int64_t i = 0; i < result.candidates; ++i) {
        const int64_t at = chunk.start + result.positions[i];
        visit(static_cast<int64_t>(bits[i]), data[flat ? at : mask.offset(at)]);
      }
    });
  }

  void patch_candidates(Bracket bracket, int64_t going, int64_t inside) {
    std::vector<CandidateRun> runs;
    for (size_t task = 0; task < chunks_.size(); ++task) {
      runs.push_back({results_[task].bits, results_[task].candidates, &scores_[chunks_[task].tensor]});
    }
    const auto [kth, below, same] = select_key(runs, inside, bracket, going);
    const bool all_ties_go = going == below + same;
    // Per weight, the largest bits of what goes for sure, of what does not stay for sure, and of the middle.
    std::vector<int64_t> under, equal, provisional;
    for (const Score& score : scores_) {
      provisional.push_back(score.bits_up_to(bracket.middle));
      under.push_back(score.bits_up_to(all_ties_go ? kth : kth - 1));
      equal.push_back(score.bits_up_to(kth));
    }
    const int64_t tasks = static_cast<int64_t>(chunks_.size());
    std::vector<int64_t> ties(chunks_.size());
    share_tasks(all_ties_go ? 0 : tasks, [&](int64_t task, int64_t) {
      const int64_t tensor = chunks_[task].tensor, low = under[tensor], high = equal[tensor];
      by_bits(weights_[tensor].dtype, [&]<class T>(T) {
        const T* bits = static_cast<const T*>(results_[task].bits);
        ties[task] = std::count_if(bits, bits + results_[task].candidates, [=](T one) {
          return low < static_cast<int64_t>(one) && static_cast<int64_t>(one) <= high;
        });
      });
    });
    std::vector<int64_t> before(chunks_.size());
    std::exclusive_scan(ties.begin(), ties.end(), before.begin(), int64_t{0});
    // The middle was near: few masks are wrong, and their lines are no longer in cache.
    share_tasks(tasks, [&, ties_going = going - below](int64_t task, int64_t) {
      const int64_t tensor = chunks_[task].tensor;
      for_each_mask(task, [low = under[tensor], high = equal[tensor], middle = provisional[tensor],
                           left = ties_going - before[task]](int64_t bits, uint8_t& mask) mutable {
        const bool tie = low < bits && bits <= high;
        const bool keep = bits > high || (tie && left <= 0);
        left -= tie;
        if (keep != (bits > middle)) {
          mask = keep;
        }
      });
    });
  }

  // All candidates have one score: the first `going` of them, chunk after chunk.
  void patch_equals(Bracket bracket, int64_t going) {
    std::vector<int64_t> before(chunks_.size());
    std::transform_exclusive_scan(results_.begin(), results_.end(), before.begin(), int64_t{0}, std::plus<>(),
                                  [](const ChunkResult& result) { return result.candidates; });
    share_tasks(static_cast<int64_t>(chunks_.size()), [&](int64_t task, int64_t worker) {
      const Chunk& chunk = chunks_[task];
      int64_t left = std::min(results_[task].candidates, going - before[task]);
      if (left <= 0) {
        return;
      }
      const int64_t low = scores_[chunk.tensor].bits_up_to(bracket.below);
      const int64_t high = scores_[chunk.tensor].bits_up_to(bracket.last);
      if (left == results_[task].candidates) {
        sweep_chunk(chunk, workers_[worker], {high, high, high}, false);
        return;
      }
      with_runs(chunk, workers_[worker], [&]<class T>(const T* x, uint8_t* mask) {
        for (int64_t i = 0; i < chunk.count && left > 0; ++i) {
          const int64_t magnitude = static_cast<int64_t>(x[i] & kMagnitude<T>);
          if (low < magnitude && magnitude <= high) {
            mask[i] = 0;
            --left;
          }
        }
      });
    });
  }

  const std::vector<Strided>& weights_;
  const std::vector<Strided>& masks_;
  const std::vector<Score> scores_;
  const int64_t removed_;
  const std::vector<Chunk> chunks_;
  std::vector<ChunkResult> results_;
  std::vector<Worker> workers_;
};

}  // namespace

std::vector<int64_t> select_masks(const Competition& competition) {
  return Selection(competition).run();
}

}  // namespace pyprune
