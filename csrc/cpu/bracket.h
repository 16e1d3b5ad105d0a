// Where to look for the k-th smallest score: a bracket from a sample, narrowed by what each sweep has shown.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "score.h"
#include "strided.h"

namespace pyprune {

// The key of all elements that a base lacks, below all scores. Either a bracket has this key alone, or it has not.
constexpr int64_t kLacking = -1;

// The keys above `below` and up to `last`; the one looked for is probably near `middle` (below <= middle <= last).
struct Bracket {
  int64_t below, middle, last;
  bool one_score() const { return last - below == 1; }
};

class BracketSearch {
 public:
  // Looks for the `removed`-th smallest score (0 < removed < number of elements).
  BracketSearch(const std::vector<Strided>& weights, const std::vector<std::optional<Strided>>& bases,
                const std::vector<Score>& scores, int64_t removed);

  // A bracket within what is still possible; of one score, or without a sample, its middle is `below`. After a few
  // misses it is all that is still possible.
  Bracket next();
  // The score looked for was not in the bracket, but below or above it.
  void too_high(Bracket bracket) { last_ = bracket.below; }
  void too_low(Bracket bracket) { below_ = bracket.last; }

 private:
  void draw_sample();
  void draw(int64_t start, int64_t count, size_t& tensor);
  int64_t sampled(int64_t rank);
  Bracket without_crowds(Bracket bracket, double expected) const;

  const std::vector<Strided>& weights_;
  const std::vector<std::optional<Strided>>& bases_;  // empty, or one or none for each weight
  const std::vector<Score>& scores_;
  std::vector<int64_t> ends_;    // flat index behind each weight, all weights in a row
  std::vector<int64_t> sample_;  // keys; empty for few weights, which are all candidates
  int64_t sorted_rank_ = 0;      // nothing before this rank is larger than what is behind it
  double rank_ = 0;              // of the score looked for, in the sample
  double error_ = 0;             // standard deviation of that rank
  double spread_;                // half-width of the bracket, in such deviations
  uint64_t seed_ = 0;            // a sample that misled is drawn anew from other places
  int proposals_ = 0;
  int64_t below_;  // the score looked for is above this
  int64_t last_;   // and not above this
};

// Tests only: moves every estimate of where the score lies by this many standard deviations, so that the sweep
// misses.
void shift_bracket(double sigmas);
double bracket_shift();

}  // namespace pyprune
