#include "bracket.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "parallel.h"

namespace pyprune {
namespace {

std::atomic<double> bracket_shift{0.0};

constexpr int64_t kNoSample = 2048;  // so few weights are all candidates
constexpr int64_t kSamplesPerTask = 4096;
constexpr int64_t kInFlight = 64;
constexpr double kSpread = 2.5;  // misses one time in 80, and a miss costs one more sweep
constexpr double kWidestSpread = 1000;
constexpr int kPatience = 8;  // proposals before everything that is still possible becomes a candidate

// A fixed scramble: the place within a stratum must not follow a pattern that the weights could have too.
uint64_t scramble(uint64_t x) {
  x = (x + 0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// The bracket is about sqrt(sample) / sample of the weights wide: this size balances the two.
int64_t sample_size(int64_t total) {
  return static_cast<int64_t>(0.5 * std::pow(static_cast<double>(total), 2.0 / 3.0)) + 512;
}

}  // namespace

BracketSearch::BracketSearch(const std::vector<Strided>& weights, const std::vector<Score>& scores, int64_t removed)
    : weights_(weights), scores_(scores), spread_(kSpread), last_(Score::infinity_key(scores[0].wide)) {
  int64_t total = 0;
  for (const Strided& weight : weights) {
    ends_.push_back(total += weight.numel);
  }
  if (total <= kNoSample) {
    return;
  }
  sample_.resize(sample_size(total));
  const int64_t size = static_cast<int64_t>(sample_.size());
  rank_ = static_cast<double>(size) * (static_cast<double>(removed) / static_cast<double>(total));
  draw_sample();
}

void BracketSearch::draw_sample() {
  const int64_t size = static_cast<int64_t>(sample_.size());
  sorted_rank_ = 0;
  ++seed_;
  share_tasks((size + kSamplesPerTask - 1) / kSamplesPerTask, [&](int64_t task, int64_t) {
    size_t tensor = 0;
    const int64_t end = std::min(size, (task + 1) * kSamplesPerTask);
    for (int64_t start = task * kSamplesPerTask; start < end; start += kInFlight) {
      draw(start, std::min(kInFlight, end - start), tensor);
    }
  });
}

// Keys of one element of each of `count` strata from `start` on; `tensor` moves on to where the last one lies. Nearly
// each element is a cache miss and a page walk: all are under way before the first is used.
void BracketSearch::draw(int64_t start, int64_t count, size_t& tensor) {
  const int64_t size = static_cast<int64_t>(sample_.size());
  const int64_t whole = ends_.back() / size, rest = ends_.back() % size;
  const auto begin_of = [&](int64_t stratum) { return stratum * whole + stratum * rest / size; };
  std::pair<size_t, const char*> drawn[kInFlight];
  int64_t begin = begin_of(start);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t end = begin_of(start + i + 1);
    const uint64_t width = static_cast<uint64_t>(end - begin);
    const int64_t flat =
        begin + static_cast<int64_t>((scramble(seed_ << 40 | static_cast<uint64_t>(start + i)) >> 32) * width >> 32);
    begin = end;
    while (flat >= ends_[tensor]) {
      ++tensor;
    }
    drawn[i] = {tensor, weights_[tensor].at(flat - ends_[tensor] + weights_[tensor].numel)};
    __builtin_prefetch(drawn[i].second);
  }
  for (int64_t i = 0; i < count; ++i) {
    const Score& score = scores_[drawn[i].first];
    by_bits(score.dtype, [&]<class T>(T) {
      sample_[start + i] = score.key(*reinterpret_cast<const T*>(drawn[i].second) & kMagnitude<T>);
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
      const double sigma = std::sqrt(rank_ * (1 - rank_ / static_cast<double>(size)));
      const double half = spread_ * sigma + 1, center = rank_ + bracket_shift * sigma;
      const int64_t first = static_cast<int64_t>(center - half),
                    last = static_cast<int64_t>(std::ceil(center + half));
      const int64_t below = first < 0 ? below_ : std::max(below_, sampled(std::min(first, size - 1)) - 1);
      const int64_t middle = sampled(std::min(static_cast<int64_t>(rank_), size - 1));
      const int64_t end = last >= size ? last_ : std::min(last_, sampled(std::max<int64_t>(last, 0)));
      if (below < end) {
        return without_crowds({below, std::clamp(middle, below, end), end}, 2 * half);
      }
      spread_ *= 4;
      draw_sample();
    }
  }
  return {below_, below_, last_};
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

void shift_bracket(double sigmas) {
  bracket_shift = sigmas;
}

}  // namespace pyprune
