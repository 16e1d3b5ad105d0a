#include "bracket.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "parallel.h"

namespace pyprune {
namespace {

std::atomic<double> shift{0.0};

constexpr int64_t kNoSample = 2048;  // so few weights are all candidates
constexpr int64_t kNeighbours = 8;   // elements drawn at one place, which is what costs time
constexpr int64_t kPlacesPerTask = 512;
constexpr int64_t kTimeToDraw = 200;  // at one place, in elements that are swept meanwhile
constexpr int64_t kInFlight = 64;
constexpr double kSpread = 4.0;  // only the probes are swept in so wide a bracket, and a miss is dear
constexpr double kWidestSpread = 1000;
constexpr int kPatience = 8;  // proposals before everything that is still possible becomes a candidate

// What bases lack is never set aside: it is left out of a bracket that has scores too.
Bracket apart(Bracket bracket) {
  if (bracket.last > kLacking) {
    bracket.below = std::max(bracket.below, kLacking);
    bracket.middle = std::max(bracket.middle, kLacking);
  }
  return bracket;
}

// A fixed scramble: the place within a stratum must not follow a pattern that the weights could have too.
uint64_t scramble(uint64_t x) {
  x = (x + 0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// A sample of s leaves a part of the weights in the bracket that falls with sqrt(s). What that costs in the sweep of
// the probes balances what drawing costs at this size.
int64_t sample_size(int64_t total) {
  return static_cast<int64_t>(0.12 * std::pow(static_cast<double>(total), 2.0 / 3.0)) + 256;
}

}  // namespace

BracketSearch::BracketSearch(const std::vector<Strided>& weights, const std::vector<std::optional<Strided>>& bases,
                             const std::vector<Score>& scores, int64_t removed)
    : weights_(weights),
      bases_(bases),
      scores_(scores),
      spread_(kSpread),
      below_(bases.empty() ? kLacking : kLacking - 1),
      last_(Score::infinity_key(scores[0].wide)) {
  int64_t total = 0;
  for (const Strided& weight : weights) {
    ends_.push_back(total += weight.numel);
  }
  if (total <= kNoSample) {
    return;
  }
  sample_.resize(sample_size(total) / kNeighbours * kNeighbours);
  const int64_t size = static_cast<int64_t>(sample_.size());
  rank_ = static_cast<double>(size) * (static_cast<double>(removed) / static_cast<double>(total));
  draw_sample();
}

void BracketSearch::draw_sample() {
  const int64_t size = static_cast<int64_t>(sample_.size()), places = size / kNeighbours;
  ++seed_;
  share_tasks((places + kPlacesPerTask - 1) / kPlacesPerTask, kTimeToDraw * places, [&](int64_t task, int64_t) {
    size_t tensor = 0;
    const int64_t end = std::min(places, (task + 1) * kPlacesPerTask);
    for (int64_t start = task * kPlacesPerTask; start < end; start += kInFlight) {
      draw(start, std::min(kInFlight, end - start), tensor);
    }
  });
  // Neighbours can be alike, so the error is judged by how much places differ from the next.
  const std::vector<int64_t> drawn = sample_;
  sorted_rank_ = 0;
  const int64_t middle = sampled(std::min(static_cast<int64_t>(rank_), size - 1));
  double differences = 0;
  int64_t before = 0;
  for (int64_t place = 0; place < places; ++place) {
    const auto first = drawn.begin() + place * kNeighbours;
    const int64_t below = std::count_if(first, first + kNeighbours, [=](int64_t key) { return key <= middle; });
    differences += place > 0 ? static_cast<double>((below - before) * (below - before)) : 0;
    before = below;
  }
  const double independent = rank_ * (1 - rank_ / static_cast<double>(size));
  error_ = std::sqrt(std::max(independent, differences / 2));
}

// Keys of a few neighbours from each of `count` strata from `start` on; `tensor` moves on to where the last ones lie.
// Nearly each place is a cache miss and a page walk: all are under way before the first is used.
void BracketSearch::draw(int64_t start, int64_t count, size_t& tensor) {
  const int64_t places = static_cast<int64_t>(sample_.size()) / kNeighbours;
  const int64_t whole = ends_.back() / places, rest = ends_.back() % places;
  const auto begin_of = [&](int64_t stratum) { return stratum * whole + stratum * rest / places; };
  const auto tensor_of = [&](int64_t flat) {
    while (flat >= ends_[tensor]) {
      ++tensor;
    }
    return tensor;
  };
  const auto element = [&](size_t of, int64_t flat) {
    return weights_[of].at(flat - ends_[of] + weights_[of].numel);
  };
  const auto base_of = [&](size_t of, int64_t flat) -> const char* {
    const bool based = !bases_.empty() && bases_[of].has_value();
    return based ? bases_[of]->at(flat - ends_[of] + weights_[of].numel) : nullptr;
  };
  int64_t drawn[kInFlight];
  const size_t first_tensor = tensor_of(begin_of(start));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = begin_of(start + i), end = begin_of(start + i + 1) - kNeighbours + 1;
    const uint64_t random = scramble(seed_ << 40 | static_cast<uint64_t>(start + i)) >> 32;
    drawn[i] = begin + static_cast<int64_t>(random * static_cast<uint64_t>(end - begin) >> 32);
    const size_t of = tensor_of(drawn[i]);
    __builtin_prefetch(element(of, drawn[i]));
    if (const char* const byte = base_of(of, drawn[i])) {
      __builtin_prefetch(byte);
    }
  }
  tensor = first_tensor;
  for (int64_t i = 0; i < count * kNeighbours; ++i) {
    const int64_t flat = drawn[i / kNeighbours] + i % kNeighbours;
    const Score& score = scores_[tensor_of(flat)];
    by_bits(score.dtype, [&]<class T>(T) {
      const T bits = *reinterpret_cast<const T*>(element(tensor, flat)) & kMagnitude<T>;
      const char* const byte = base_of(tensor, flat);
      sample_[start * kNeighbours + i] = byte == nullptr || *byte != 0 ? score.key(bits) : kLacking;
    });
  }
}

// The key of this rank. The sample is left partitioned around it, so that higher ranks are then cheap.
int64_t BracketSearch::sampled(int64_t rank) {
  const auto from = sample_.begin() + (rank > sorted_rank_ ? sorted_rank_ : 0);
  std::nth_element(from, sample_.begin() + rank, sample_.end());
  sorted_rank_ = rank;
  return sample_[rank];
}

Bracket BracketSearch::next() {
  if (below_ >= last_) {
    throw std::runtime_error("pyprune: the weights changed while they were read");
  }
  const int64_t size = static_cast<int64_t>(sample_.size());
  if (size > 0 && proposals_++ < kPatience) {
    while (spread_ < kWidestSpread) {
      const double half = spread_ * error_ + 1, center = rank_ + shift * error_;
      const int64_t first = static_cast<int64_t>(center - half),
                    last = static_cast<int64_t>(std::ceil(center + half));
      const int64_t below = first < 0 ? below_ : std::max(below_, sampled(std::min(first, size - 1)) - 1);
      const int64_t middle = sampled(std::min(static_cast<int64_t>(rank_), size - 1));
      const int64_t end = last >= size ? last_ : std::min(last_, sampled(std::max<int64_t>(last, 0)));
      if (below < end) {
        return without_crowds(apart({below, std::clamp(middle, below, end), end}), 2 * half);
      }
      spread_ *= 4;
      draw_sample();
    }
  }
  return apart({below_, below_, last_});
}

// An end of the bracket that very many weights share would make all of them candidates. If it is the likeliest score,
// it alone becomes the bracket; otherwise it is left out, and if that was wrong, the next bracket is that score
// alone.
Bracket BracketSearch::without_crowds(Bracket bracket, double expected) const {
  const auto in_sample = [&](int64_t below, int64_t last) {
    return static_cast<double>(
        std::ranges::count_if(sample_, [=](int64_t key) { return below < key && key <= last; }));
  };
  const auto [below, middle, last] = bracket;
  if (!bracket.one_score() && in_sample(below, last) > 2 * expected) {
    const bool crowd_first = in_sample(below, below + 1) > expected / 2;
    const bool crowd_last = in_sample(last - 1, last) > expected / 2;
    if (crowd_first && middle <= below + 1) {
      bracket.last = below + 1;
    } else if (crowd_last && middle >= last) {
      bracket.below = last - 1;
    } else {
      bracket.below += crowd_first;
      bracket.last -= crowd_last && bracket.last - bracket.below > 1;
    }
  }
  bracket.middle = bracket.one_score() ? bracket.below : std::clamp(middle, bracket.below, bracket.last);
  return bracket;
}

double bracket_shift() {
  return shift;
}

void shift_bracket(double sigmas) {
  shift = sigmas;
}

}  // namespace pyprune
