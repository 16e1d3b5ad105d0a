// The few scores that a sweep set aside, and the selection among them.
#pragma once

#include <cstdint>
#include <utility>
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

// The rank-th smallest key (from 1) of the candidates, all of them in the bracket, and how many lie below it.
// `total` is the number of candidates of all runs.
std::pair<int64_t, int64_t> select_key(const std::vector<CandidateRun>& runs, int64_t total, Bracket bracket,
                                       int64_t rank);

}  // namespace pyprune
