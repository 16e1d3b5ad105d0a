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

struct Counts {
  int64_t below = 0;   // candidates below the bracket
  int64_t inside = 0;  // candidates in it
};

Counts count_keys(const std::vector<CandidateRun>& runs, Bracket bracket);

struct Selected {
  int64_t key;
  int64_t below;  // candidates with a smaller key
  int64_t same;   // candidates with this key
};

// The rank-th smallest key (from 1) of the candidates in the bracket; they are `total`.
Selected select_key(const std::vector<CandidateRun>& runs, int64_t total, Bracket bracket, int64_t rank);

}  // namespace pyprune
