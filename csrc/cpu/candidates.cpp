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

// Narrows the bracket to one of many equal intervals; returns how many candidates lie below that one.
int64_t narrow(const std::vector<CandidateRun>& runs, Bracket& bracket, int64_t rank) {
  int unused = Score::kKeyBits;  // low bits that are zero in every key
  for (const CandidateRun& run : runs) {
    unused = std::min(unused, run.score->unused_key_bits());
  }
  int shift = unused;
  while ((bracket.last - bracket.below - 1) >> shift >= kBins) {
    ++shift;
  }
  // Two tables in turn: when many candidates share a bin, a counter would wait for its own last write.
  std::vector<std::vector<int64_t>> counts(thread_count(), std::vector<int64_t>(2 * kBins));
  share_tasks(static_cast<int64_t>(runs.size()), [&](int64_t task, int64_t worker) {
    int64_t* table = counts[worker].data();
    int64_t* other = table + kBins;
    for_each_key(runs[task], [table, other, shift, first = bracket.below + 1](int64_t key) mutable {
      ++table[(key - first) >> shift];
      std::swap(table, other);
    });
  });
  int64_t bin = 0, below = 0;
  for (;; ++bin) {
    int64_t here = 0;
    for (const auto& one : counts) {
      here += one[bin] + one[bin + kBins];
    }
    if (below + here >= rank) {
      break;
    }
    below += here;
  }
  bracket.below += bin << shift;
  bracket.last = bracket.below + (int64_t{1} << shift);
  if (shift == unused) {
    // The interval holds one key at the most.
    bracket.last = bracket.last >> shift << shift;
    bracket.below = bracket.last - 1;
  }
  return below;
}

}  // namespace

std::pair<int64_t, int64_t> select_key(const std::vector<CandidateRun>& runs, int64_t total, Bracket bracket,
                                       int64_t rank) {
  int64_t below = 0;
  if (total > kFew) {
    below = narrow(runs, bracket, rank);
  }
  if (bracket.one_score()) {
    return {bracket.last, below};
  }
  std::vector<std::vector<int64_t>> keys(thread_count());
  share_tasks(static_cast<int64_t>(runs.size()), [&](int64_t task, int64_t worker) {
    for_each_key(runs[task], [&mine = keys[worker], bracket](int64_t key) {
      if (bracket.below < key && key <= bracket.last) {
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
  below += std::count_if(all.begin(), nth, [&](int64_t key) { return key < *nth; });
  return {*nth, below};
}

}  // namespace pyprune
