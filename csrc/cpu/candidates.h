// The few scores that a sweep set aside, and the selection among them.
#pragma once

#include <cstdint>
#include <vector>

#include "bracket.h"
#include "score.h"

namespace pyprune {

// Magnitude bits of the candidates of one chunk, in the unsigned type of their weight.
struct CandidateRun {
  const void* bits;
  int64_t count;
  const Score* score;
};

struct Selected {
  int64_t key;
  int64_t below;  // candidates with a smaller key
  int64_t same;   // candidates with this key
};

// The rank-th smallest key (from 1) of the candidates, all of them in the bracket. `total` is the number of
// candidates of all runs.
Selected select_key(const std::vector<CandidateRun>& runs, int64_t total, Bracket bracket, int64_t rank);

}  // namespace pyprune
