// How the k smallest scores are found while the weights are read once:
//
//   1. A small stratified sample of the scores gives a bracket that holds the k-th very probably (bracket.h).
//   2. The first elements of each chunk, the probes, are swept in that bracket: what lies below is counted, the
//      candidates inside are set aside, and provisional masks are written, split in its middle (sweeper.h).
//   3. The probes are a sample a hundred times as large. They give a bracket a tenth as wide (probes.h), and all the
//      rest is swept in that. If the counts show that it missed, they bound the k-th score from one side, and all is
//      swept again: always exact, hardly ever slow.
//   4. The k-th score is selected among the candidates (candidates.h), and the few masks between it and the middle
//      are corrected. Of equal scores the first in the order of the list go.
//
// A bracket can be one score wide, when many weights share it (half types, weights that are already zero). Then
// candidates are only counted: the counts say which pieces lose all of them, and only one piece is walked.
//
// What a base lacks goes before all scores: the sweep counts it as below every bracket.
//
// Scores that are divided by norms need no second read either. The probes tell the norms within some error, by which
// the bracket is made wider for each weight, and the sweep sums the squares. In the end the norms are exact, and so
// are the scores of the candidates; only if the k-th is not certainly among them, all is swept again. Half types are
// read twice, which takes less time than their candidates would.
//
// Scores compare as integers: the bits of |w| order like |w|, and |w| * scale never falls as |w| grows. So a bound on
// scores becomes a bound on the bits of |w| per tensor (score.h), and the sweep needs no arithmetic. How far off an
// estimate may be is judged by how much neighbouring chunks differ, because elements of a chunk are alike. Misses
// hardly ever happen; tests force them with _C._shift_bracket.
#include "select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>

#include "bracket.h"
#include "candidates.h"
#include "parallel.h"
#include "probes.h"
#include "sweeper.h"

namespace pyprune {
namespace {

// More than this part of the weights takes longer to set aside than to read all of them again.
constexpr double kMostCandidates = 0.05;

// An all-zero weight has no norm to divide by, but a score of zero. One with a NaN has no scores, and masks that mean
// nothing, but the order of scores stays well defined.
double scale_of(double norm) {
  if (std::isnan(norm)) {
    return 0.0;
  }
  constexpr double kTiny = std::numeric_limits<double>::min(), kMax = std::numeric_limits<double>::max();
  return 1.0 / std::clamp(norm, kTiny, kMax);
}

int64_t bytes_of(const std::vector<Strided>& weights) {
  return std::accumulate(weights.begin(), weights.end(), int64_t{0}, [](int64_t sum, const Strided& weight) {
    return sum + weight.numel * item_size(weight.dtype);
  });
}

class Selection {
 public:
  explicit Selection(const Competition& competition)
      : competition_(competition),
        sweeper_(competition.weights, competition.masks, competition.bases),
        squares_(competition.normalize ? competition.weights : std::vector<Strided>()) {
    const bool scaled = competition.normalize || !competition.scales.empty();
    for (size_t i = 0; i < competition.weights.size(); ++i) {
      const double scale = competition.scales.empty() ? 1.0 : competition.scales[i];
      scores_.push_back({competition.weights[i].dtype, scaled, competition.wide, scale});
    }
  }

  std::vector<int64_t> run() {
    const int64_t total = elements_of(competition_.weights);
    if (competition_.removed == 0 || competition_.removed == total) {
      // Nothing competes: one sweep writes the masks, and looks for what is not finite.
      const int64_t bound = competition_.removed == 0 ? -1 : Score::largest_key(competition_.wide);
      sweep(Which::kAll, {{bound, bound, bound}});
      return sweeper_.nonfinite();
    }
    if (competition_.normalize && select_with_estimated_norms()) {
      return sweeper_.nonfinite();
    }
    BracketSearch search = new_search();
    for (bool first = true;; first = false) {
      sweeper_.clear();
      const Bracket wide = search.next();
      const Plan plan = first ? plan_after_probes(wide) : Plan{wide};
      sweep(first ? Which::kRest : Which::kAll, plan);
      if (any_nonfinite()) {
        return sweeper_.nonfinite();
      }
      Places places = places_in(plan.bracket);
      if (plan.bracket.last == kLacking && places.going <= 0) {
        return sweeper_.nonfinite();  // the bases alone lack as many: all that they have was kept
      }
      if (places.going < 0) {
        search.too_high(plan.bracket);
      } else if (places.going > places.inside) {
        search.too_low(plan.bracket);
      } else {
        correct_masks(plan.bracket, places);
        return sweeper_.nonfinite();
      }
    }
  }

 private:
  BracketSearch new_search() const {
    return BracketSearch(competition_.weights, competition_.bases, scores_, competition_.removed);
  }

  // ---- norms ----

  // Takes the norms first, which reads all weights.
  void measure_norms(Which not_read_yet) {
    sweeper_.sum_squares(not_read_yet, squares_);
    set_scales([this](size_t weight) { return std::sqrt(squares_.of_weight(weight)); });
  }

  // Returns whether the masks are right. If not, the scores have exact scales now.
  bool select_with_estimated_norms() {
    if (2 * bytes_of(competition_.weights) <= 5 * elements_of(competition_.weights)) {
      measure_norms(Which::kAll);  // half types are read twice in less time than all their candidates take
      return false;
    }
    sweeper_.sum_squares(Which::kProbes, squares_);
    const NormEstimate estimate = estimate_norms(sweeper_, squares_, scores_.size());
    if (estimate.slack.empty()) {
      measure_norms(Which::kRest);
      return false;
    }
    set_scales([&](size_t weight) { return estimate.norms[weight]; });
    const Bracket wide = new_search().next();
    if (wide.one_score()) {
      measure_norms(Which::kRest);  // a crowd must not be set aside, but only counted, and that takes exact scores
      return false;
    }
    slack_ = estimate.slack;
    const Plan plan = plan_after_probes(wide);
    const std::vector<Bounds> bounds = bounds_of(plan.bracket);
    if (candidates_in_rest(bounds) > kMostCandidates * static_cast<double>(elements_of(competition_.weights))) {
      slack_.clear();
      measure_norms(Which::kRest);  // scores that crowd together as long as norms are not exact
      return false;
    }
    sweep(Which::kRest, plan);
    slack_.clear();
    set_scales([this](size_t weight) { return std::sqrt(squares_.of_weight(weight)); });
    const Bracket bracket = certain(bounds);
    if (any_nonfinite() || bracket.below >= bracket.last) {
      return false;
    }
    Places places = places_in(bracket);
    const bool found = places.going >= 0 && places.going <= places.inside;
    if (found) {
      correct_masks(bracket, places);
    }
    return found;
  }

  // How many there would be, by what the probes show.
  double candidates_in_rest(const std::vector<Bounds>& bounds) const {
    double candidates = 0;
    for (size_t i = 0; i < sweeper_.pieces().size(); ++i) {
      const Piece& piece = sweeper_.pieces()[i];
      if (piece.probe) {
        const auto [low, middle, high] = bounds[piece.tensor];
        candidates += (piece.stands_for() - 1) * static_cast<double>(sweeper_.count_between(i, low, high));
      }
    }
    return candidates;
  }

  template <class Norm>
  void set_scales(const Norm& norm_of) {
    for (size_t i = 0; i < scores_.size(); ++i) {
      scores_[i].scale = scale_of(norm_of(i));
    }
  }

  // The keys of which all are set aside that were swept between these bounds.
  Bracket certain(const std::vector<Bounds>& bounds) const {
    Bracket bracket{-1, -1, Score::largest_key(false)};
    for (size_t i = 0; i < scores_.size(); ++i) {
      const auto [low, middle, high] = bounds[i];
      if (low >= 0) {
        bracket.below = std::max(bracket.below, scores_[i].key(static_cast<uint64_t>(low)));
      }
      if (high < scores_[i].largest_bits()) {
        bracket.last = std::min(bracket.last, scores_[i].key(static_cast<uint64_t>(high) + 1) - 1);
      }
    }
    return bracket;
  }

  // ---- the sweep ----

  // The bracket in bits of each weight; wider by what its norm may be off.
  std::vector<Bounds> bounds_of(Bracket bracket) const {
    std::vector<Bounds> bounds;
    for (size_t i = 0; i < scores_.size(); ++i) {
      Score low = scores_[i], high = scores_[i];
      if (!slack_.empty()) {
        low.scale *= 1 + slack_[i];
        high.scale *= 1 - slack_[i];
      }
      bounds.push_back(
          {low.bits_up_to(bracket.below), scores_[i].bits_up_to(bracket.middle), high.bits_up_to(bracket.last)});
    }
    return bounds;
  }

  void sweep(Which which, const Plan& plan) {
    const std::vector<Bounds> bounds = bounds_of(plan.bracket);
    const bool estimated = !slack_.empty();
    const bool count_only = plan.bracket.last - plan.bracket.below <= 1 && !estimated;
    const auto bounds_of_piece = [&](size_t piece) {
      Bounds result = bounds[sweeper_.pieces()[piece].tensor];
      if (count_only) {
        result.middle = piece < plan.ties_stay ? result.high : result.low;
      }
      return result;
    };
    const bool sum = estimated && which != Which::kProbes;  // those of the probes are there
    sweeper_.sweep(which, bounds_of_piece, !count_only, sum ? &squares_ : nullptr);
  }

  // Sweeps the probes, and says how to sweep the rest.
  Plan plan_after_probes(Bracket wide) {
    sweep(Which::kProbes, {wide});
    return plan_of(sweeper_, scores_, wide, competition_.removed);
  }

  bool any_nonfinite() const {
    return std::ranges::any_of(sweeper_.swept(), [](const Swept& swept) { return swept.nonfinite > 0; });
  }

  // ---- the candidates ----

  std::vector<CandidateRun> candidates() const {
    std::vector<CandidateRun> runs;
    for (size_t i = 0; i < sweeper_.pieces().size(); ++i) {
      const Swept& swept = sweeper_.swept()[i];
      if (swept.bits != nullptr && swept.candidates > 0) {
        runs.push_back({swept.bits, swept.candidates, &scores_[sweeper_.pieces()[i].tensor]});
      }
    }
    return runs;
  }

  // How many of the elements in the bracket must go, how many there are, and the keys of those that were set aside.
  struct Places {
    int64_t going, inside;
    std::vector<int64_t> keys;
  };

  Places places_in(Bracket bracket) const {
    Keys keys = keys_in(candidates(), bracket);
    Places places{competition_.removed - keys.below, static_cast<int64_t>(keys.inside.size()), {}};
    for (size_t i = 0; i < sweeper_.pieces().size(); ++i) {
      const Swept& swept = sweeper_.swept()[i];
      places.going -= sweeper_.pieces()[i].count - swept.above;
      places.inside += swept.bits == nullptr ? swept.candidates : 0;
    }
    if (bracket.below == kLacking) {
      places.going = std::max<int64_t>(places.going, 0);  // bases that lack more than must go take nothing else along
    }
    places.keys = std::move(keys.inside);
    return places;
  }

  // The first of the elements in the bracket go, in the order of their scores and places.
  void correct_masks(Bracket bracket, Places& places) {
    Selected kth{bracket.below + 1, 0, places.inside};  // right for one score, and where nothing in the bracket goes
    if (places.going > 0 && !bracket.one_score()) {
      kth = select_key(places.keys, bracket, places.going);
    }
    // Per weight, the largest bits of what goes for sure, and of what does not stay for sure.
    std::vector<int64_t> under, equal;
    for (const Score& score : scores_) {
      under.push_back(score.bits_up_to(kth.key - 1));
      equal.push_back(score.bits_up_to(kth.key));
    }
    const auto& pieces = sweeper_.pieces();
    const int64_t ties_going = places.going - kth.below, tasks = static_cast<int64_t>(pieces.size());
    const bool all_ties_go = places.going > 0 && ties_going == kth.same;
    std::vector<int64_t> ties(pieces.size()), before(pieces.size());
    const int64_t elements = elements_of(competition_.weights);  // candidates are few, but far from each other
    if (!all_ties_go) {
      share_tasks(tasks, elements, [&](int64_t i, int64_t) {
        const int64_t tensor = pieces[i].tensor;
        const bool counted = sweeper_.swept()[i].bits == nullptr;
        ties[i] = counted ? sweeper_.swept()[i].candidates : sweeper_.count_between(i, under[tensor], equal[tensor]);
      });
      std::exclusive_scan(ties.begin(), ties.end(), before.begin(), int64_t{0});
    }
    share_tasks(tasks, elements, [&](int64_t i, int64_t) {
      const Swept& swept = sweeper_.swept()[i];
      const int64_t low = under[pieces[i].tensor], high = equal[pieces[i].tensor], middle = swept.bounds.middle;
      if (swept.bits == nullptr) {
        const int64_t count = swept.candidates;
        const int64_t gone = all_ties_go ? count : std::clamp<int64_t>(ties_going - before[i], 0, count);
        if ((gone > 0 && middle == swept.bounds.low) || (gone < count && middle == swept.bounds.high)) {
          sweeper_.rewrite(i, gone);
        }
        return;
      }
      sweeper_.correct(i, low, high, all_ties_go ? INT64_MAX : ties_going - before[i]);
    });
  }

  const Competition& competition_;
  Sweeper sweeper_;
  NormBlocks squares_;
  std::vector<Score> scores_;
  std::vector<double> slack_;  // empty: the scales are exact. Otherwise how far off each may be, as a part of itself
};

}  // namespace

std::vector<int64_t> select_masks(const Competition& competition) {
  return Selection(competition).run();
}

}  // namespace pyprune
