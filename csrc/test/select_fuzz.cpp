// The selection of the threshold on random lists of tensors, against a stable sort: every dtype, layout, scale, base,
// thread count and capability, and values that are hard to part. Meant to run under sanitizers.
//
//   select_fuzz [seconds [seed]]    a failure names its seed; `select_fuzz 0 <seed>` repeats that round
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "../cpu/bracket.h"
#include "../cpu/norm_blocks.h"
#include "../cpu/score.h"
#include "../cpu/select.h"
#include "check.h"

namespace pyprune::test {
namespace {

bool one_in(int64_t n) {
  return random_between(1, n) == 1;
}

template <class T>
T any_of(std::initializer_list<T> values) {
  return values.begin()[random_between(0, values.size() - 1)];
}

// Three dimensions in any order in memory, with gaps between their elements or without.
struct Layout {
  std::array<int64_t, 3> sizes, strides;
  int64_t numel, extent = 1;

  explicit Layout(const std::array<int64_t, 3>& sizes_) : sizes(sizes_), numel(sizes[0] * sizes[1] * sizes[2]) {
    std::array<int, 3> order = {2, 1, 0};
    if (one_in(2)) {
      std::ranges::shuffle(order, random_bits);
    }
    const bool gaps = one_in(3);
    for (const int d : order) {
      extent += gaps ? random_between(0, 2) : 0;
      strides[d] = extent;
      extent *= std::max<int64_t>(sizes[d], 1);
    }
  }
  int64_t at(int64_t flat) const {
    return flat / (sizes[1] * sizes[2]) * strides[0] + flat / sizes[2] % sizes[1] * strides[1] +
           flat % sizes[2] * strides[2];
  }
  Strided view(void* data, Dtype dtype) const { return Strided(data, dtype, sizes.data(), strides.data(), 3); }
};

// Bits of magnitudes of one kind, from low to high.
struct Crowd {
  uint64_t low, high;

  explicit Crowd(Dtype dtype) : low(0), high(infinity_bits(dtype) - 1) {
    const uint64_t normal = dtype == Dtype::kFloat64   ? uint64_t{1} << 52
                            : dtype == Dtype::kFloat32 ? uint64_t{1} << 23
                            : dtype == Dtype::kFloat16 ? uint64_t{1} << 10
                                                       : uint64_t{1} << 7;
    switch (random_between(0, 6)) {
      case 0: high = 0; break;       // zeros
      case 1: high = normal; break;  // denormals
      case 2:                        // one binade
        low = random_bits() % (high / normal) * normal;
        high = low + normal - 1;
        break;
      case 3:  // one value, or a few neighbours
        low = random_bits() % high;
        high = std::min(high, low + any_of<uint64_t>({0, 1, 4}));
        break;
      case 4: low = high -= random_bits() % normal; break;  // of the largest ones there are, one value
      default: break;                                       // anything
    }
  }
  uint64_t draw() const { return low + random_bits() % (high - low + 1); }
};

// Draws a crowd, with others among it or without.
struct Magnitudes {
  Crowd crowd, others;
  int64_t one_in_so_many;  // is of the others; 0: none
  bool sprinkled;          // with infinities and NaN

  explicit Magnitudes(Dtype dtype)
      : crowd(dtype), others(dtype), one_in_so_many(any_of({0, 0, 2, 30, 1000})), sprinkled(one_in(10)) {
    if (one_in(3)) {  // the next ones of the crowd
      others.low = crowd.high;
      others.high = std::min(crowd.high + 8, infinity_bits(dtype) - 1);
    }
  }
  uint64_t draw(Dtype dtype) const {
    if (sprinkled && one_in(50)) {
      return infinity_bits(dtype) + random_bits() % 2;
    }
    return one_in_so_many > 0 && one_in(one_in_so_many) ? others.draw() : crowd.draw();
  }
};

// A weight with its mask and its base, and the memory of all.
struct Case {
  Dtype dtype;
  Layout layout, mask_layout, base_layout;
  std::vector<char> weight;  // no longer than needed, so that a sanitizer sees each step beyond the end
  std::vector<uint8_t> mask, base;

  Case(Dtype dtype_, const std::array<int64_t, 3>& sizes)
      : dtype(dtype_),
        layout(sizes),
        mask_layout(sizes),
        base_layout(sizes),
        weight(layout.extent * item_size(dtype)),
        mask(mask_layout.extent),
        base(base_layout.extent) {
    const Magnitudes magnitudes(dtype);
    std::vector<uint64_t> bits(layout.numel);
    std::ranges::generate(bits, [&] { return magnitudes.draw(dtype); });
    if (one_in(4)) {
      std::ranges::sort(bits);  // what a sample shows of one place is true of no other
    }
    for (int64_t i = 0; i < layout.numel; ++i) {
      write(i, bits[i] | (random_bits() & 1) << (8 * item_size(dtype) - 1));
    }
  }
  // Of `of` elements the base lacks `lacking`, on average; it may be any byte but zero where it lacks none.
  void draw_base(int64_t lacking, int64_t of) {
    for (int64_t i = 0; i < layout.numel; ++i) {
      base[base_layout.at(i)] = random_between(1, of) <= lacking ? 0 : any_of<uint8_t>({1, 1, 255});
    }
  }
  char* element(int64_t flat) { return weight.data() + layout.at(flat) * item_size(dtype); }
  void write(int64_t flat, uint64_t bits) { std::memcpy(element(flat), &bits, item_size(dtype)); }
  uint64_t read(int64_t flat) {
    uint64_t bits = 0;
    std::memcpy(&bits, element(flat), item_size(dtype));
    return bits;
  }
};

std::array<int64_t, 3> random_sizes() {
  switch (random_between(0, 9)) {
    case 0: return {random_between(0, 2), random_between(0, 3), random_between(0, 3)};
    case 1: return {1, random_between(60'000, 140'000), 1};  // over several chunks
    case 2: return {random_between(10, 40), random_between(50, 90), random_between(50, 90)};
    default: return {random_between(1, 20), random_between(1, 20), random_between(1, 20)};
  }
}

double norm_of(const Strided& weight) {
  NormBlocks squares({weight});
  Room room;
  squares.add({0, 0, weight.numel}, weight.in_a_row(0, weight.numel, room));
  return std::sqrt(squares.of_weight(0));
}

void test_round() {
  const bool mixed = one_in(3);
  const Dtype common = any_of({Dtype::kFloat32, Dtype::kFloat64, Dtype::kFloat16, Dtype::kBFloat16});
  std::vector<Case> cases;
  Competition competition;
  for (int64_t left = random_between(1, 5); left > 0; --left) {
    cases.emplace_back(mixed ? any_of({common, Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16}) : common,
                       random_sizes());
    competition.wide |= cases.back().dtype == Dtype::kFloat64;
  }
  const bool scaled = one_in(2);
  competition.normalize = !scaled && !competition.wide && one_in(2);
  const bool based = one_in(2);
  int64_t lacking = 0;  // elements, in all bases
  std::vector<double> scores;
  std::vector<int64_t> nonfinite;
  for (Case& one : cases) {
    competition.weights.push_back(one.layout.view(one.weight.data(), one.dtype));
    competition.masks.push_back(one.mask_layout.view(one.mask.data(), Dtype::kBool));
    double scale = 1.0;
    if (scaled) {
      scale = std::ldexp(1 + random_between(0, 99) / 100.0, random_between(-30, 30));
      competition.scales.push_back(scale);
    } else if (competition.normalize) {
      scale = 1 / std::max(norm_of(competition.weights.back()), std::numeric_limits<double>::min());
    }
    nonfinite.push_back(0);
    const bool has_base = based && !one_in(4);
    if (has_base) {
      one.draw_base(any_of<int64_t>({0, 1, 50, 99, 100}), 100);
    }
    if (based) {
      competition.bases.push_back(has_base ? std::optional(one.base_layout.view(one.base.data(), Dtype::kBool))
                                           : std::nullopt);
    }
    for (int64_t i = 0; i < one.layout.numel; ++i) {
      const double weight = std::fabs(value_of(one.dtype, one.read(i))), score = weight * scale;
      const bool lacks = has_base && one.base[one.base_layout.at(i)] == 0;
      lacking += lacks;
      scores.push_back(lacks ? -1 : competition.wide ? score : static_cast<float>(score));
      nonfinite.back() += !std::isfinite(weight);
    }
  }
  // With such weights the masks are of no use, and whoever asked for them is told.
  const bool usable = std::ranges::count(nonfinite, 0) == std::ssize(nonfinite);
  const int64_t count = scores.size();
  competition.removed = any_of({random_between(0, count), random_between(lacking, count), lacking, count, count / 2,
                                std::min<int64_t>(count, 1), std::max<int64_t>(count - 1, 0)});
  if (count > 0 && one_in(3)) {  // all up to some score, and no more
    const double last = scores[random_between(0, count - 1)];
    competition.removed = std::ranges::count_if(scores, [last](double score) { return score <= last; });
  }
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  if (usable) {
    std::ranges::stable_sort(order, {}, [&](size_t i) { return scores[i]; });
  }
  std::vector<uint8_t> expected(count, 1);
  for (int64_t i = 0; i < competition.removed; ++i) {
    expected[order[i]] = 0;
  }
  for (int64_t i = 0; i < count; ++i) {
    expected[i] = expected[i] != 0 && scores[i] != -1;
  }
  set_thread_count(random_between(1, 4));
  shift_bracket(any_of({0.0, 0.0, -10.0, -4.0, -3.0, 3.0, 4.0, 10.0}));  // a bracket that misses, or nearly
  with_each_capability([&] {
    for (Case& one : cases) {
      std::ranges::fill(one.mask, uint8_t{2});
    }
    EXPECT(select_masks(competition) == nonfinite);
    auto next = expected.begin();
    for (Case& one : cases) {
      for (int64_t i = 0; i < one.layout.numel; ++i) {
        uint8_t& mask = one.mask[one.mask_layout.at(i)];
        EXPECT(usable ? mask == *next++ : mask <= 1);
        mask = 2;
      }
      EXPECT(std::ranges::count(one.mask, 2) == one.mask_layout.extent);  // nothing between the elements is written
    }
  });
}

}  // namespace
}  // namespace pyprune::test

int main(int argc, char** argv) {
  using namespace pyprune::test;
  double seconds = 5;
  seed = std::random_device{}();
  char rest;
  if (argc > 3 || (argc > 1 && std::sscanf(argv[1], "%lf%c", &seconds, &rest) != 1) ||
      (argc > 2 && std::sscanf(argv[2], "%llu%c", &seed, &rest) != 1)) {
    std::fprintf(stderr, "usage: select_fuzz [seconds [seed]], two numbers, by default 5 and a random one\n");
    return 2;
  }
  std::printf("select_fuzz: %g s from seed %llu\n", seconds, seed);
  std::fflush(stdout);
  const auto start = std::chrono::steady_clock::now();
  int64_t rounds = 0;
  do {
    random_bits.seed(seed);
    test_round();
    ++seed, ++rounds;
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
  std::printf("select_fuzz: passed %lld rounds\n", static_cast<long long>(rounds));
}
