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

struct Interval {
  int64_t below;   // candidates below it
  int64_t inside;  // candidates in it
};

// Narrows the bracket to the one of many equal intervals that holds the rank-th candidate.
Interval narrow(const std::vector<CandidateRun>& runs, Bracket& bracket, int64_t rank) {
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
  Interval interval{0, 0};
  int64_t bin = 0;
  for (;; ++bin) {
    interval.inside = 0;
    for (const auto& one : counts) {
      interval.inside += one[bin] + one[bin + kBins];
    }
    if (interval.below + interval.inside >= rank) {
      break;
    }
    interval.below += interval.inside;
  }
  bracket.below += bin << shift;
  bracket.last = bracket.below + (int64_t{1} << shift);
  if (shift == unused) {
    // The interval holds one key at the most.
    bracket.last = bracket.last >> shift << shift;
    bracket.below = bracket.last - 1;
  }
  return interval;
}

}  // namespace

Selected select_key(const std::vector<CandidateRun>& runs, int64_t total, Bracket bracket, int64_t rank) {
  Interval interval{0, total};
  if (total > kFew) {
    interval = narrow(runs, bracket, rank);
  }
  if (bracket.one_score()) {
    return {bracket.last, interval.below, interval.inside};
  }
  std::vector<std::vector<int64_t>> keys(thread_count());
  share_tasks(static_cast<int64_t>(runs.size()), [&](int64_t task, int64_t worker) {
    const uint64_t first = static_cast<uint64_t>(bracket.below) + 1, size = bracket.last - bracket.below;
    for_each_key(runs[task], [&mine = keys[worker], first, size](int64_t key) {
      if (static_cast<uint64_t>(key) - first < size) {  // below the interval it wraps around
        mine.push_back(key);
      }
    });
  });
  std::vector<int64_t> all;
  for (const auto& one : keys) {
    all.insert(all.end(), one.begin(), one.end());
  }
  const auto nth = all.begin() + (rank - interval.below - 1);
  std::nth_element(all.begin(), nth, all.end());
  const int64_t key = *nth;
  return {key, interval.below + std::count_if(all.begin(), nth, [key](int64_t one) { return one < key; }),
          std::count(all.begin(), all.end(), key)};
}

}  // namespace pyprune
