#include "probes.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "candidates.h"

namespace pyprune {
namespace {

constexpr double kSpread = 3.0;       // standard deviations of the rank; a miss costs one more sweep
constexpr double kNormSpread = 4.0;   // of a norm; all weights of a model must lie within
constexpr double kWidestSlack = 0.2;  // beyond, very many elements would be candidates
constexpr double kRounding = 1e-6;    // more than float32 scores are rounded by

struct Estimate {
  double total = 0;
  double error = 0;  // its standard deviation
};

// The total over all chunks, of what value_of(piece) is for their probes. How much neighbouring chunks of a weight
// differ shows how far off it may be; at the least as far as with independent elements, each with variance_of(mean).
template <class Value, class Variance>
Estimate extrapolate(const std::vector<Piece>& pieces, size_t begin, size_t end, const Value& value_of,
                     const Variance& variance_of) {
  Estimate estimate;
  double independent = 0, neighbours = 0;
  double before = 0;                // mean of the chunk before
  int64_t in_row = 0, weight = -1;  // chunks of this weight so far
  for (size_t i = begin; i < end; ++i) {
    const Piece& piece = pieces[i];
    if (!piece.probe) {
      continue;
    }
    const double mean = value_of(i) / static_cast<double>(piece.count);
    const double rest = static_cast<double>(piece.of - piece.count) * static_cast<double>(piece.of);
    estimate.total += mean * static_cast<double>(piece.of);
    independent += rest / static_cast<double>(piece.count) * variance_of(mean);
    in_row = piece.tensor == weight ? in_row + 1 : 1;
    weight = piece.tensor;
    if (in_row > 1) {
      // The first chunk has no neighbour before it: the second counts for both.
      neighbours += rest * (mean - before) * (mean - before) / (in_row == 2 ? 1 : 2);
    }
    before = mean;
  }
  estimate.error = std::sqrt(std::max(independent, neighbours));
  return estimate;
}

// The piece in front of which `going` elements have the score of the bracket, which is the only one in it.
size_t split_of(const Sweeper& sweeper, const std::vector<Score>& scores, Bracket bracket, double going) {
  for (size_t i = 0; i < sweeper.pieces().size(); ++i) {
    const Piece& piece = sweeper.pieces()[i];
    const Swept& swept = sweeper.swept()[i];
    if (!piece.probe) {
      continue;
    }
    const Score& score = scores[piece.tensor];
    const int64_t ties = swept.bits != nullptr ? sweeper.count_between(i, score.bits_up_to(bracket.below),
                                                                       score.bits_up_to(bracket.last))
                                               : swept.candidates;
    going -= piece.stands_for() * static_cast<double>(ties);
    if (going < 0) {
      return i;
    }
  }
  return sweeper.pieces().size();
}

}  // namespace

Plan plan_of(const Sweeper& sweeper, const std::vector<Score>& scores, Bracket bracket, int64_t removed) {
  const std::vector<Piece>& pieces = sweeper.pieces();
  const std::vector<Swept>& swept = sweeper.swept();
  const Estimate below = extrapolate(
      pieces, 0, pieces.size(), [&](size_t i) { return static_cast<double>(pieces[i].count - swept[i].above); },
      [](double mean) { return mean * (1 - mean); });
  double rank = static_cast<double>(removed) - below.total + bracket_shift() * below.error;
  if (bracket.one_score()) {
    return {bracket, split_of(sweeper, scores, bracket, rank)};
  }
  std::vector<CandidateRun> runs;
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (pieces[i].probe && swept[i].candidates > 0) {
      runs.push_back({swept[i].bits, swept[i].candidates, &scores[pieces[i].tensor], pieces[i].stands_for()});
    }
  }
  const Histogram histogram = histogram_of(runs, bracket);
  rank -= histogram.below;  // where a bracket was made wider
  const double half = kSpread * below.error + 1;
  // The intervals that hold the ranks in question, and how many candidates lie below the middle one.
  size_t from = 0, middle = 0, to = 0;
  double seen = 0, under_middle = 0;
  for (size_t bin = 0; bin < histogram.counts.size(); ++bin) {
    from = seen <= rank - half ? bin : from;
    to = seen <= rank + half ? bin : to;
    if (seen <= rank) {
      middle = bin;
      under_middle = seen;
    }
    seen += histogram.counts[bin];
  }
  if (rank + half <= 0 || rank - half >= seen) {
    return {bracket};  // the score is not in it, by all that is known: the sweep will tell
  }
  // Of two crowds that share a score each, setting both aside costs more than to sweep again now and then.
  const double inside = std::accumulate(histogram.counts.begin() + from, histogram.counts.begin() + to + 1, 0.0);
  if (histogram.finest && inside > 4 * half) {
    from = to = middle;
  }
  const Bracket one = histogram.bracket_of(middle, middle), all = histogram.bracket_of(from, to);
  Plan plan{{std::max(all.below, bracket.below), 0, std::min(all.last, bracket.last)}};
  if (plan.bracket.one_score()) {
    plan.bracket.middle = plan.bracket.below;
    plan.ties_stay = split_of(sweeper, scores, plan.bracket, rank - under_middle);
  } else {
    const int64_t nearer = rank - under_middle > histogram.counts[middle] / 2 ? one.last : one.below;
    plan.bracket.middle = std::clamp(nearer, plan.bracket.below, plan.bracket.last);
  }
  return plan;
}

NormEstimate estimate_norms(const Sweeper& sweeper, const NormBlocks& squares, size_t weights) {
  const std::vector<Piece>& pieces = sweeper.pieces();
  NormEstimate estimate;
  double elements = 0, errors = 0;
  size_t end = 0;
  for (size_t weight = 0; weight < weights; ++weight) {
    const size_t begin = end;
    double count = 0;
    for (; end < pieces.size() && pieces[end].tensor == static_cast<int64_t>(weight); ++end) {
      count += static_cast<double>(pieces[end].count);
    }
    const Estimate sum = extrapolate(
        pieces, begin, end, [&](size_t i) { return squares.of_run(pieces[i]); },
        [](double mean) { return 2 * mean * mean; });                    // of a normal distribution
    const double error = sum.error > 0 ? sum.error / sum.total / 2 : 0;  // of the root
    estimate.norms.push_back(std::sqrt(sum.total));
    estimate.slack.push_back(kNormSpread * error + kRounding);
    elements += count;
    errors += error * count * error * count;
  }
  // The threshold itself moves with all norms.
  const double moved = kNormSpread * std::sqrt(errors) / std::max(elements, 1.0);
  for (double& slack : estimate.slack) {
    slack += moved;
  }
  if (!std::ranges::all_of(estimate.slack, [](double slack) { return slack < kWidestSlack; })) {
    estimate.slack.clear();
  }
  return estimate;
}

}  // namespace pyprune
