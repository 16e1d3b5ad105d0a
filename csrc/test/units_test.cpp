// Units without torch and Python: scores and masks of random tensors in random layouts, against the plainest loops;
// meant to run under sanitizers (make test-cpp).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "../cpu/unit_pattern.h"
#include "../cpu/unit_sums.h"
#include "check.h"

namespace pyprune::test {
namespace {

// A tensor of ones, twos, ... of up to four dimensions, which fill their memory in any order, or every other element.
struct Random {
  std::vector<int64_t> sizes, strides, block, units;
  std::vector<float> memory;
  int64_t numel = 1, unit_count = 1;

  Random() {
    constexpr int64_t kSizes[] = {1, 2, 3, 7, 9, 16, 17, 33, 70, 300};
    const int64_t dims = random_between(0, 4);
    for (int64_t d = 0; d < dims; ++d) {
      const int64_t size = numel > 5000 ? random_between(1, 3) : kSizes[random_between(0, 9)];
      sizes.push_back(size);
      block.push_back(random_between(0, 1) == 0 ? random_between(1, size) : random_between(0, 1) == 0 ? 1 : size);
      units.push_back((size + block[d] - 1) / block[d]);
      numel *= size;
      unit_count *= units[d];
    }
    std::vector<int64_t> order(dims);
    std::iota(order.begin(), order.end(), 0);
    if (random_between(0, 2) > 0) {
      std::shuffle(order.begin(), order.end(), random_bits);
    }
    strides.resize(dims);
    int64_t stride = random_between(0, 4) == 0 ? 2 : 1;
    for (const int64_t d : order) {
      strides[d] = stride;
      stride *= sizes[d];
    }
    memory.resize(stride);
    std::ranges::generate(memory, [] { return static_cast<float>(random_between(-9, 9)); });
  }

  // Calls visit(place in memory, unit) for each element in C order.
  template <class Visit>
  void for_each(const Visit& visit) const {
    for (int64_t element = 0; element < numel; ++element) {
      int64_t place = 0, unit = 0, rest = element, units_inside = 1;
      for (size_t d = sizes.size(); d-- > 0; rest /= sizes[d]) {
        const int64_t index = rest % sizes[d];
        place += index * strides[d];
        unit += index / block[d] * units_inside;
        units_inside *= units[d];
      }
      visit(place, unit);
    }
  }
};

void test_sums() {
  Random x;
  const Strided tensor(x.memory.data(), Dtype::kFloat32, x.sizes.data(), x.strides.data(), x.sizes.size());
  const UnitDims dims(x.sizes.data(), x.strides.data(), x.block.data(), x.sizes.size());
  const bool maximum = random_between(0, 1) == 1, mean = !maximum && random_between(0, 1) == 1;
  std::vector<double> expected(x.unit_count, maximum ? -HUGE_VAL : 0.0), counts(x.unit_count);
  x.for_each([&](int64_t place, int64_t unit) {
    const double value = std::fabs(x.memory[place]);
    expected[unit] = maximum ? std::max(expected[unit], value) : expected[unit] + value;
    ++counts[unit];
  });
  with_each_capability([&] {
    std::vector<double> scores(x.unit_count);
    UnitSums sums(tensor, dims, {UnitPower::kMagnitude, maximum, 1}, mean, true, scores.data());
    UnitSums::Rooms rooms;
    for (int64_t first = 0; first < sums.parts();) {
      const int64_t count = random_between(1, sums.parts() - first);
      sums.add(first, count, rooms);
      first += count;
    }
    for (int64_t tile = 0; tile < sums.unfinished(); ++tile) {
      sums.finish(tile, rooms);
    }
    for (int64_t unit = 0; unit < x.unit_count; ++unit) {
      // Sums of small integers are exact in any order.
      EXPECT(scores[unit] == (mean ? expected[unit] / counts[unit] : expected[unit]));
    }
  });
}

void test_pattern() {
  Random x;
  std::vector<uint8_t> units(x.unit_count);
  std::ranges::generate(units, [] { return static_cast<uint8_t>(random_between(0, 1)); });
  std::vector<int64_t> unit_strides(x.sizes.size());
  int64_t stride = 1;
  for (size_t d = x.sizes.size(); d-- > 0; stride *= x.units[d]) {
    unit_strides[d] = stride;
  }
  Strided tensor(x.memory.data(), Dtype::kFloat32, x.sizes.data(), x.strides.data(), x.sizes.size());
  const UnitPattern pattern(tensor, x.sizes.data(), x.strides.data(), x.block.data(), x.sizes.size(), units.data(),
                            unit_strides.data());
  std::vector<uint8_t> expected;
  x.for_each([&](int64_t place, int64_t unit) {
    if (tensor.contiguous() && x.numel > 1) {
      expected.resize(x.numel);
      expected[place] = units[unit];
    } else {
      expected.push_back(units[unit]);
    }
  });
  with_each_capability([&] {
    std::vector<uint8_t> from_runs(x.numel, 1);
    for (int64_t start = 0; start < x.numel;) {
      const int64_t count = random_between(1, x.numel - start);
      std::vector<uint8_t> mask(count);
      pattern.write(start, count, mask.data());
      EXPECT(std::equal(mask.begin(), mask.end(), expected.begin() + start));
      pattern.for_each_dropped_run(
          start, count, [&](int64_t first, int64_t run) { std::fill_n(from_runs.begin() + first, run, 0); });
      start += count;
    }
    EXPECT(from_runs == expected);
  });
}

}  // namespace
}  // namespace pyprune::test

int main() {
  for (int i = 0; i < 1000; ++i) {
    pyprune::test::test_sums();
    pyprune::test::test_pattern();
  }
  std::puts("units_test: passed");
}
