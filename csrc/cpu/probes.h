// What the probes of a sweep say of all weights: where to look for the k-th score among the rest, and the norms.
#pragma once

#include <cstddef>
#include <vector>

#include "bracket.h"
#include "norm_blocks.h"
#include "score.h"
#include "sweeper.h"

namespace pyprune {

// How to sweep the rest. If the bracket is one score, elements that have it go in the pieces in front of `ties_stay`.
struct Plan {
  Bracket bracket;
  size_t ties_stay = 0;
};

// From probes that were swept in a bracket that probably holds the `removed`-th smallest score of all.
Plan plan_of(const Sweeper& sweeper, const std::vector<Score>& scores, Bracket bracket, int64_t removed);

// Euclidean norms from the sums of squares of the probes, and by how much of itself each is probably off at the most.
struct NormEstimate {
  std::vector<double> norms;
  std::vector<double> slack;  // empty if the probes do not tell
};

NormEstimate estimate_norms(const Sweeper& sweeper, const NormBlocks& squares, size_t weights);

}  // namespace pyprune
