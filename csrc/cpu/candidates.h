// The few scores that a sweep set aside, and the selection among them.
#pragma once

#include <cstdint>
#include <vector>

#include "bracket.h"
#include "score.h"

namespace pyprune {

// Magnitude bits of the candidates of one piece, in the unsigned type of their weight.
struct CandidateRun {
  const void* bits;
  int64_t count;
  const Score* score;
  double weight = 1;  // each counts as so many
};

// How many candidates have a key in each of many equal intervals of a bracket.
struct Histogram {
  int64_t first;  // key of the first interval
  int shift;      // an interval has 2^shift keys
  bool finest;    // no interval holds more than one key that occurs
  double below;   // candidates below the first interval
  std::vector<double> counts;

  // The keys of the intervals `from` to `to`, both included; of one interval that is the finest, its only key.
  Bracket bracket_of(size_t from, size_t to) const;
};

Histogram histogram_of(const std::vector<CandidateRun>& runs, Bracket bracket);

// The keys of the candidates in a bracket, in any order, and how many candidates are below it.
struct Keys {
  int64_t below = 0;
  std::vector<int64_t> inside;
};

Keys keys_in(const std::vector<CandidateRun>& runs, Bracket bracket);

struct Selected {
  int64_t key;
  int64_t below;  // smaller keys
  int64_t same;   // keys equal to it
};

// The rank-th smallest (from 1) of these keys, all of them in the bracket. Reorders them.
Selected select_key(std::vector<int64_t>& keys, Bracket bracket, int64_t rank);

}  // namespace pyprune
