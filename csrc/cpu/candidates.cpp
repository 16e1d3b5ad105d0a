#include "candidates.h"

#include <algorithm>

#include "parallel.h"

namespace pyprune {
namespace {

constexpr int64_t kFew = 2048;
constexpr int64_t kBins = 1024;

template <class Visit>
void for_each_key(const CandidateRun& run, Visit visit) {
  run.score->with_key([&](const auto& key_of) {
    by_bits(run.score->dtype, [&]<class T>(T) {
      const T* bits = static_cast<const T*>(run.bits);
      for (int64_t i = 0; i < run.count; ++i) {
        visit(key_of(bits[i]));
      }
    });
  });
}

void share_runs(const std::vector<CandidateRun>& runs, const std::function<void(int64_t run, int64_t worker)>& body) {
  int64_t candidates = 0;
  for (const CandidateRun& run : runs) {
    candidates += run.count;
  }
  share_tasks(static_cast<int64_t>(runs.size()), candidates, body);
}

// What one thread counts. Keys outside of all bins are counted too, for want of a branch, in several places in turn:
// a counter waits for its own last write.
constexpr uint64_t kOutside = 16;
struct Table {
  double counts[kBins + kOutside] = {};
  double below = 0;
};

// The bits to drop, `least` or more, so that the keys of a bracket fall into kBins equal intervals at the most.
int shift_of(Bracket bracket, int least) {
  while ((bracket.last - bracket.below - 1) >> least >= kBins) {
    ++least;
  }
  return least;
}

// How far above `first` a key is; a key below wraps around, and is farther than any bracket is wide.
uint64_t distance(int64_t key, int64_t first) {
  return static_cast<uint64_t>(key) - static_cast<uint64_t>(first);
}

}  // namespace

Histogram histogram_of(const std::vector<CandidateRun>& runs, Bracket bracket) {
  int unused = Score::kKeyBits;  // low bits that are zero in every key
  for (const CandidateRun& run : runs) {
    unused = std::min(unused, run.score->unused_key_bits());
  }
  const int shift = shift_of(bracket, unused);
  const int64_t first = bracket.below + 1;
  const uint64_t size = static_cast<uint64_t>(bracket.last - bracket.below);
  std::vector<Table> tables(thread_count());
  share_runs(runs, [&](int64_t task, int64_t worker) {
    Table& table = tables[worker];
    int64_t under = 0;
    size_t turn = 0;
    for_each_key(runs[task], [&, first, size, shift, weight = runs[task].weight](int64_t key) {
      const uint64_t at = distance(key, first);
      under += key < first;
      turn = (turn + 1) % kOutside;
      table.counts[at < size ? at >> shift : kBins + turn] += weight;
    });
    table.below += static_cast<double>(under) * runs[task].weight;
  });
  Histogram histogram{first, shift, shift == unused, 0, std::vector<double>(((size - 1) >> shift) + 1)};
  for (const Table& table : tables) {
    histogram.below += table.below;
    for (size_t bin = 0; bin < histogram.counts.size(); ++bin) {
      histogram.counts[bin] += table.counts[bin];
    }
  }
  return histogram;
}

Bracket Histogram::bracket_of(size_t from, size_t to) const {
  // Behind the last of the widest intervals no key is left, nor a number for it.
  const auto before = [this](uint64_t bin) {
    return static_cast<int64_t>(std::min(static_cast<uint64_t>(first) + (bin << shift), uint64_t{1} << 63) - 1);
  };
  Bracket bracket{before(from), 0, before(to + 1)};
  if (finest && from == to) {
    // The only key in it that can occur.
    bracket.last = bracket.last >> shift << shift;
    bracket.below = bracket.last - 1;
  }
  bracket.middle = bracket.below;
  return bracket;
}

Keys keys_in(const std::vector<CandidateRun>& runs, Bracket bracket) {
  std::vector<Keys> found(thread_count());
  const int64_t first = bracket.below + 1;
  const uint64_t size = static_cast<uint64_t>(bracket.last - bracket.below);
  share_runs(runs, [&](int64_t task, int64_t worker) {
    // Without a branch that nobody could guess: every key is written, and those inside stay.
    constexpr int64_t kTogether = 512;
    int64_t together[kTogether], count = 0, below = 0;
    std::vector<int64_t>& inside = found[worker].inside;
    for_each_key(runs[task], [&](int64_t key) {
      below += key < first;
      together[count] = key;
      count += distance(key, first) < size;
      if (count == kTogether) {
        inside.insert(inside.end(), together, together + count);
        count = 0;
      }
    });
    inside.insert(inside.end(), together, together + count);
    found[worker].below += below;
  });
  Keys keys = std::move(found[0]);
  for (size_t worker = 1; worker < found.size(); ++worker) {
    keys.below += found[worker].below;
    keys.inside.insert(keys.inside.end(), found[worker].inside.begin(), found[worker].inside.end());
  }
  return keys;
}

Selected select_key(std::vector<int64_t>& keys, Bracket bracket, int64_t rank) {
  auto begin = keys.begin(), end = keys.end();
  int64_t below = 0;
  if (end - begin > kFew) {
    // First the one of many intervals that holds it.
    const auto bin_of = [shift = shift_of(bracket, 0), first = bracket.below + 1](int64_t key) {
      return (key - first) >> shift;
    };
    std::vector<int64_t> counts(kBins);
    for (const int64_t key : keys) {
      ++counts[bin_of(key)];
    }
    int64_t bin = 0;
    while (below + counts[bin] < rank) {
      below += counts[bin++];
    }
    end = std::partition(begin, end, [=](int64_t key) { return bin_of(key) == bin; });
  }
  const auto nth = begin + (rank - below - 1);
  std::nth_element(begin, nth, end);
  const int64_t key = *nth;
  return {key, below + std::count_if(begin, nth, [key](int64_t one) { return one < key; }),
          std::count(begin, end, key)};
}

}  // namespace pyprune
