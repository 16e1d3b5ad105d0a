// What the kernels of threshold know about the search at any time. All of it lies in device memory: the host never
// waits for it.
#pragma once

#include "block_loop.cuh"

namespace pyprune {
namespace {

using Count = unsigned long long;  // what CUDA adds atomically

// Where the classes of a tensor's magnitudes begin, as bits: what goes for sure, then the ties of the lowest score of
// the bracket, candidates, ties of its highest, and what stays. Provisional masks keep magnitudes from `split` on.
struct Bounds {
  uint64_t low_ties;
  uint64_t candidates;
  uint64_t high_ties;
  uint64_t above;
  uint64_t split;
};

// The ties of a group of tensors that competes for itself: of the weights whose key is `key`, the first `going` go.
// While digits of the key are searched, `going` counts those that match the digits found so far.
struct Ties {
  uint64_t key;
  int64_t going;
  int half;      // 0 or 16: where the counts of tiles have them
  bool dropped;  // by the provisional masks
  bool settled;  // the provisional masks are right
};

// The search for the last score to go among all tensors, by a sample. A candidate is one number,
// (key - first_key) << position_bits | number of the element, so no two are equal, and ties need no care. Keys are
// without the low bits that are zero in all of them.
struct Search {
  // From the sample.
  uint64_t first_key;
  uint64_t low_key, high_key;
  int candidate_bits;
  uint64_t provisional;  // provisional masks drop the candidates below this one
  // From the sweep.
  // kept: all that is not below the bracket, and that no base lacks
  Count kept, low_ties, high_ties, candidates;
  int missed;  // the bracket missed, or there was no room for all candidates
  // Of the candidates that match `prefix`, `rank` go; open_bits of them are not known yet.
  int64_t rank;
  uint64_t prefix;
  int open_bits;
  uint64_t limit;  // candidates below it go
  unsigned arrived;
};

constexpr uint64_t kAllCandidates = ~uint64_t{0};  // above every candidate

// After the sweep: where the last score to go lies.
__device__ inline void decide(Search& search, Ties& ties, int64_t total, int64_t removed, int64_t room) {
  const int64_t low = static_cast<int64_t>(search.low_ties), high = static_cast<int64_t>(search.high_ties);
  const int64_t candidates = static_cast<int64_t>(search.candidates);
  int64_t going = removed - (total - static_cast<int64_t>(search.kept));  // of the bracket
  const bool nothing_competes = removed == 0 || removed == total;
  // Only what bases lack lies below the lowest score. If that is more than must go, nothing else goes.
  const bool from_lowest = search.low_key == 0;
  if (from_lowest && going < 0) going = 0;
  const bool too_high = going <= 0 && !from_lowest;
  search.missed = !nothing_competes && (too_high || going > low + candidates + high || candidates > room);
  if (search.missed) return;
  ties = {0, 0, 0, false, true};
  if (nothing_competes) return;
  if (going <= low) {
    ties = {search.low_key, going, 0, true, going == low};
    return;  // limit is zero
  }
  going -= low;
  if (going <= candidates) {
    search.rank = going;
    search.open_bits = search.candidate_bits;
    return;
  }
  search.limit = kAllCandidates;
  ties = {search.high_key, going - candidates, 16, false, false};
}

}  // namespace
}  // namespace pyprune
