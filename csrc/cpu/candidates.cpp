#include "candidates.h"

#include <algorithm>

#include "parallel.h"

namespace pyprune {
namespace {

constexpr int64_t kFew = 2048;
constexpr int64_t kBins = 1024;

template <class Visit>
void for_each_key(const CandidateRun& run, Visit visit) {
  run.score->with_key([&](const auto& key_of) {
    by_bits(run.score->dtype, [&]<class T>(T) {
      const T* bits = static_cast<const T*>(run.bits);
      for (int64_t i = 0; i < run.count; ++i) {
        visit(key_of(bits[i]));
      }
    });
  });
}

// What one thread counts. Keys outside of all bins are counted too, for want of a branch, in several places in turn:
// a counter waits for its own last write.
constexpr uint64_t kOutside = 16;
struct Table {
  double counts[kBins + kOutside] = {};
  double below = 0;
};

// How far above `first` a key is; a key below wraps around, and is farther than any bracket is wide.
uint64_t distance(int64_t key, int64_t first) {
  return static_cast<uint64_t>(key) - static_cast<uint64_t>(first);
}

}  // namespace

Histogram histogram_of(const std::vector<CandidateRun>& runs, Bracket bracket) {
  int unused = Score::kKeyBits;  // low bits that are zero in every key
  for (const CandidateRun& run : runs) {
    unused = std::min(unused, run.score->unused_key_bits());
  }
  int shift = unused;
  while ((bracket.last - bracket.below - 1) >> shift >= kBins) {
    ++shift;
  }
  const int64_t first = bracket.below + 1;
  const uint64_t size = static_cast<uint64_t>(bracket.last - bracket.below);
  std::vector<Table> tables(thread_count());
  share_tasks(static_cast<int64_t>(runs.size()), [&](int64_t task, int64_t worker) {
    Table& table = tables[worker];
    int64_t under = 0;
    size_t turn = 0;
    for_each_key(runs[task], [&, first, size, shift, weight = runs[task].weight](int64_t key) {
      const uint64_t at = distance(key, first);
      under += key < first;
      turn = (turn + 1) % kOutside;
      table.counts[at < size ? at >> shift : kBins + turn] += weight;
    });
    table.below += static_cast<double>(under) * runs[task].weight;
  });
  Histogram histogram{first, shift, shift == unused, 0, std::vector<double>(((size - 1) >> shift) + 1)};
  for (const Table& table : tables) {
    histogram.below += table.below;
    for (size_t bin = 0; bin < histogram.counts.size(); ++bin) {
      histogram.counts[bin] += table.counts[bin];
    }
  }
  return histogram;
}

Counts count_keys(const std::vector<CandidateRun>& runs, Bracket bracket) {
  std::vector<Counts> counts(thread_count());
  share_tasks(static_cast<int64_t>(runs.size()), [&](int64_t task, int64_t worker) {
    Counts counted;
    for_each_key(runs[task], [&counted, bracket](int64_t key) {
      counted.below += key <= bracket.below;
      counted.inside += bracket.below < key && key <= bracket.last;
    });
    counts[worker].below += counted.below;
    counts[worker].inside += counted.inside;
  });
  Counts all;
  for (const Counts& one : counts) {
    all.below += one.below;
    all.inside += one.inside;
  }
  return all;
}

Bracket Histogram::bracket_of(size_t from, size_t to) const {
  const auto before = [this](uint64_t bin) {
    return static_cast<int64_t>(static_cast<uint64_t>(first) + (bin << shift) - 1);
  };
  Bracket bracket{before(from), 0, before(to + 1)};
  if (finest && from == to) {
    // The only key in it that can occur.
    bracket.last = bracket.last >> shift << shift;
    bracket.below = bracket.last - 1;
  }
  bracket.middle = bracket.below;
  return bracket;
}

Selected select_key(const std::vector<CandidateRun>& runs, int64_t total, Bracket bracket, int64_t rank) {
  int64_t below = 0, inside = total;
  if (total > kFew) {
    const Histogram histogram = histogram_of(runs, bracket);
    size_t bin = 0;
    while (below + static_cast<int64_t>(histogram.counts[bin]) < rank) {
      below += static_cast<int64_t>(histogram.counts[bin++]);
    }
    inside = static_cast<int64_t>(histogram.counts[bin]);
    const int64_t last = bracket.last;
    bracket = histogram.bracket_of(bin, bin);
    bracket.last = std::min(bracket.last, last);
  }
  if (bracket.one_score()) {
    return {bracket.last, below, inside};
  }
  std::vector<std::vector<int64_t>> keys(thread_count());
  const int64_t first = bracket.below + 1;
  const uint64_t size = static_cast<uint64_t>(bracket.last - bracket.below);
  share_tasks(static_cast<int64_t>(runs.size()), [&](int64_t task, int64_t worker) {
    for_each_key(runs[task], [&mine = keys[worker], first, size](int64_t key) {
      if (distance(key, first) < size) {
        mine.push_back(key);
      }
    });
  });
  std::vector<int64_t> all;
  for (const auto& one : keys) {
    all.insert(all.end(), one.begin(), one.end());
  }
  const auto nth = all.begin() + (rank - below - 1);
  std::nth_element(all.begin(), nth, all.end());
  const int64_t key = *nth;
  return {key, below + std::count_if(all.begin(), nth, [key](int64_t one) { return one < key; }),
          std::count(all.begin(), all.end(), key)};
}

}  // namespace pyprune
