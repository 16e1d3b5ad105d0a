// The CPU kernels without torch and Python, against the plainest loops: meant to run under sanitizers (make
// test-cpp).
#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>

#include "../cpu/gate_segments.h"
#include "../cpu/kernels/count_zeros.h"
#include "../cpu/kernels/crc32.h"
#include "../cpu/kernels/fold.h"
#include "../cpu/kernels/gate.h"
#include "../cpu/kernels/gate_penalty.h"
#include "../cpu/kernels/group_masks.h"
#include "../cpu/kernels/magnitude_counts.h"
#include "../cpu/kernels/norms.h"
#include "../cpu/kernels/pack.h"
#include "../cpu/kernels/park.h"
#include "../cpu/kernels/probe.h"
#include "../cpu/kernels/sparsegpt_block.h"
#include "../cpu/score.h"
#include "check.h"

namespace pyprune::test {
namespace {

const std::vector<Dtype> kFloats = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kFloat16, Dtype::kBFloat16};
const std::vector<int64_t> kLengths = {0, 1, 3, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 4095, 4097};

template <class Bits>
void test_elementwise(Dtype dtype, int64_t count) {
  const std::vector<Bits> weights = random_weights<Bits>(dtype, count);
  std::vector<uint8_t> mask(count);
  std::ranges::generate(mask, [] { return static_cast<uint8_t>(random_between(0, 1)); });
  with_each_capability([&] {
    std::vector<Bits> folded = weights, masked(count, ~Bits{0});
    PYPRUNE_KERNEL(fold_run)(folded.data(), mask.data(), folded.data(), dtype, count);
    PYPRUNE_KERNEL(fold_run)(weights.data(), mask.data(), masked.data(), dtype, count);
    int64_t zeros = 0;
    double squares = 0;
    for (int64_t i = 0; i < count; ++i) {
      EXPECT(folded[i] == (mask[i] != 0 ? weights[i] : Bits{0}));
      EXPECT(masked[i] == folded[i]);
      zeros += value_of(dtype, weights[i]) == 0;
      squares += value_of(dtype, weights[i]) * value_of(dtype, weights[i]);
    }
    const int64_t dropped = std::ranges::count(mask, 0);
    std::vector<Bits> parking = weights, parked(dropped), back = folded;
    PYPRUNE_KERNEL(park_run)(parking.data(), mask.data(), parked.data(), dtype, count, dropped);
    PYPRUNE_KERNEL(unpark_run)(back.data(), mask.data(), parked.data(), dtype, count, dropped);
    EXPECT(!PYPRUNE_KERNEL(has_stray)(folded.data(), mask.data(), dtype, count));
    EXPECT(PYPRUNE_KERNEL(has_stray)(weights.data(), mask.data(), dtype, count) == (weights != folded));
    EXPECT(parking == folded && back == weights);
    for (int64_t i = 0, next = 0; i < count; ++i) {
      EXPECT(mask[i] != 0 || parked[next++] == weights[i]);
    }
    EXPECT(PYPRUNE_KERNEL(count_zeros_run)(weights.data(), dtype, count) == zeros);
    std::vector<double> sums((count + kNormBlock - 1) / kNormBlock);
    PYPRUNE_KERNEL(sum_squares)(weights.data(), dtype, count, 1.0, sums.data());
    if (std::isfinite(squares)) {
      EXPECT(std::fabs(std::accumulate(sums.begin(), sums.end(), 0.0) - squares) <= 1e-12 * squares);
    }
  });
}

// Memory is as large as it must be, so that the sanitizer sees what is read or written behind it.
template <class Bits>
void test_pack(int64_t count, int percent) {
  std::vector<Bits> data(count), kept, wanted(count);
  const Bits significant = static_cast<Bits>(~Bits{0}) >> 1;
  for (int64_t i = 0; i < count; ++i) {
    data[i] = static_cast<Bits>(random_bits());
    if (random_between(0, 99) < percent) data[i] &= static_cast<Bits>(~significant);  // 0, or a sign alone
    if ((data[i] & significant) != 0) kept.push_back(wanted[i] = data[i]);
  }
  with_each_capability([&] {
    std::vector<uint8_t> bits((count + 7) / 8, 0xff);
    const int64_t found = PYPRUNE_KERNEL(pack_bits)(data.data(), sizeof(Bits), significant, bits.data(), count);
    EXPECT(found == static_cast<int64_t>(kept.size()));
    EXPECT(PYPRUNE_KERNEL(count_bits)(bits.data(), static_cast<int64_t>(bits.size())) == found);
    for (int64_t i = 0; i < static_cast<int64_t>(bits.size()) * 8; ++i) {
      EXPECT((bits[i / 8] >> (i % 8) & 1) == (i < count && (data[i] & significant) != 0));
    }
    std::vector<Bits> values(found);
    PYPRUNE_KERNEL(pack_values)(data.data(), sizeof(Bits), bits.data(), values.data(), count, found);
    EXPECT(values == kept);
    // Rows that begin at a line of the cache, or in it.
    for (const int64_t shift : {0, 1}) {
      const std::unique_ptr<Bits, decltype(&std::free)> memory(
          static_cast<Bits*>(std::aligned_alloc(64, ((count + shift) * sizeof(Bits) + 63) / 64 * 64)), &std::free);
      for (const bool past_caches : {false, true}) {
        Bits* const out = memory.get() + shift;
        std::fill_n(out, count, static_cast<Bits>(~Bits{0}));
        PYPRUNE_KERNEL(unpack_values)(bits.data(), values.data(), sizeof(Bits), out, count, found, past_caches);
        EXPECT(std::equal(wanted.begin(), wanted.end(), out));
      }
    }
    std::vector<Bits> exact(count);
    PYPRUNE_KERNEL(unpack_values)(bits.data(), values.data(), sizeof(Bits), exact.data(), count, found, false);
    EXPECT(exact == wanted);
  });
}

void test_crc32(int64_t count) {
  std::vector<uint8_t> data(count);
  uint32_t wanted = 0x12345678;
  for (uint8_t& byte : data) {
    byte = static_cast<uint8_t>(random_bits());
    wanted ^= byte;
    for (int bit = 0; bit < 8; ++bit) {
      wanted = (wanted >> 1) ^ ((wanted & 1) != 0 ? 0xedb88320u : 0u);
    }
  }
  with_each_capability([&] { EXPECT(PYPRUNE_KERNEL(crc32_of)(data.data(), count, 0x12345678) == wanted); });
}

template <class Bits>
void test_counts(Dtype dtype, int64_t count) {
  const std::vector<Bits> weights = random_weights<Bits>(dtype, count);
  const int bits = static_cast<int>(8 * sizeof(Bits)) - 1;
  for (const int shift : {bits - 15, bits - 3, 0}) {
    const uint64_t bins = std::min<uint64_t>(uint64_t{1} << (bits - shift), 1 << 15);
    const uint64_t low = count > 0 && shift > 0 ? weights[count / 2] & kMagnitude<Bits> : 0;
    std::vector<uint32_t> expected(bins);
    int64_t below = 0;
    for (const Bits weight : weights) {
      const uint64_t magnitude = weight & kMagnitude<Bits>;
      below += magnitude < low;
      if (magnitude >= low && (magnitude - low) >> shift < bins) {
        ++expected[(magnitude - low) >> shift];
      }
    }
    with_each_capability([&] {
      std::vector<uint32_t> tables(2 * bins);
      const Intervals intervals{low, shift, bins};
      EXPECT(PYPRUNE_KERNEL(magnitude_counts_run)(weights.data(), dtype, count, intervals, tables.data()) == below);
      for (uint64_t bin = 0; bin < bins; ++bin) {
        EXPECT(tables[bin] + tables[bins + bin] == expected[bin]);
      }
    });
  }
}

void test_noise(int64_t count) {
  const Noise noise{random_bits(), random_bits()};
  const int64_t first = 4 * random_between(0, int64_t{1} << 40);
  with_each_capability([&] {
    std::vector<uint32_t> words(count);
    PYPRUNE_KERNEL(draw_words)(noise, first, count, words.data());
    for (int64_t i = 0; i < count; ++i) {
      EXPECT(words[i] == philox(noise.seed, noise.stream, (first + i) / 4).words[i % 4]);
    }
  });
}

// One formula for all: the loops must give what gate_value gives one by one.
template <class Real>
void test_gate(const Gate& gate, int64_t count) {
  const Noise noise{random_bits(), 3};
  std::vector<Real> logits(count), weights(count), grads(count);
  const auto draw = [](Real spread) { return std::normal_distribution<Real>(0, spread)(random_bits); };
  for (int64_t i = 0; i < count; ++i) {
    logits[i] = draw(5), weights[i] = draw(1), grads[i] = draw(1);
  }
  constexpr Dtype kDtype = sizeof(Real) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
  constexpr bool kWide = sizeof(Real) == 8;
  with_each_capability([&] {
    std::vector<Real> z(count), slope(count), out(count);
    PYPRUNE_KERNEL(gate_values)
    (gate, noise, kDtype, logits.data(), 0, count, z.data(), slope.data());
    PYPRUNE_KERNEL(gate_multiply)(kDtype, weights.data(), kWide, z.data(), count, out.data());
    const GateRow row{gate, noise, kDtype, kDtype, 0, count, weights.data(), logits.data()};
    std::vector<Real> row_out(count), row_grad_weight(count), row_grad_logits(count);
    PYPRUNE_KERNEL(gate_forward)(row, row_out.data());
    PYPRUNE_KERNEL(gate_backward)(row, grads.data(), row_grad_weight.data(), row_grad_logits.data());
    EXPECT(row_out == out);
    for (int64_t i = 0; i < count; ++i) {
      EXPECT(row_grad_weight[i] == (z[i] == 0 ? Real(0) : grads[i] * z[i]));
      const uint32_t word = philox(noise.seed, noise.stream, i / 4).words[i % 4];
      with_gate_kind(gate, [&](auto kind) {
        const GateValue<Real> value = gate_value(kind, gate, logits[i], word);
        EXPECT(z[i] == value.z && slope[i] == value.slope);
        EXPECT(out[i] == (value.z == 0 ? Real(0) : weights[i] * value.z));
        EXPECT(row_grad_logits[i] == (value.slope == 0 ? Real(0) : grads[i] * weights[i] * value.slope));
      });
    }
    double expected = 0;
    for (const Real logit : logits) {
      expected += 1 / (1 + std::exp(-static_cast<double>(logit)));
    }
    const double sum = PYPRUNE_KERNEL(penalty_sum)(kDtype, logits.data(), false, 0.0, count);
    EXPECT(std::fabs(sum - expected) <= 1e-6 * count);
  });
}

// Every weight is in one segment, with the gate that it shares.
void test_segments(const std::vector<int64_t>& weight_sizes, const std::vector<int64_t>& gate_sizes) {
  const int64_t dims = weight_sizes.size();
  const int64_t numel = std::accumulate(weight_sizes.begin(), weight_sizes.end(), int64_t{1}, std::multiplies<>());
  const GateBlocks blocks(weight_sizes.data(), gate_sizes.data(), dims);
  std::vector<int64_t> gate_of(numel, -1);
  Segments(blocks).for_each([&](const Segment& segment) {
    EXPECT(segment.gates * segment.run <= kGateBlock);
    for (int64_t i = 0; i < segment.gates * segment.run; ++i) {
      EXPECT(gate_of[segment.start + i] == -1);
      gate_of[segment.start + i] = segment.gate + i / segment.run;
    }
  });
  for (int64_t flat = 0; flat < numel; ++flat) {
    int64_t rest = flat, gate = 0, step = 1;
    for (int64_t d = dims - 1; d >= 0; --d) {
      gate += rest % weight_sizes[d] / (weight_sizes[d] / gate_sizes[d]) * step;
      rest /= weight_sizes[d];
      step *= gate_sizes[d];
    }
    EXPECT(gate_of[flat] == gate);
  }
}

// Masks of groups as a stable sort gives them. `apart`: rows are next to each other, columns are not.
template <class Bits>
void test_groups(Dtype dtype, int64_t rows, int64_t columns, int64_t size, bool apart, bool with_factors,
                 bool with_base) {
  using Real = std::conditional_t<sizeof(Bits) == 8, double, float>;
  const std::vector<Bits> weights = random_weights<Bits>(dtype, rows * columns);
  std::vector<Real> factors(columns);
  std::ranges::generate(factors, [] { return static_cast<Real>(random_between(0, 3)); });
  std::vector<uint8_t> base(rows * columns), mask(rows * columns);
  std::ranges::generate(base, [] { return static_cast<uint8_t>(random_between(0, 3) != 0); });
  const Steps steps = apart ? Steps{1, rows} : Steps{columns, 1};
  const int64_t kept = random_between(0, size);
  GroupTile tile{dtype,
                 weights.data(),
                 with_base ? base.data() : nullptr,
                 mask.data(),
                 steps,
                 steps,
                 steps,
                 with_factors ? factors.data() : nullptr,
                 rows,
                 columns,
                 size,
                 kept};
  const auto room = std::make_unique<GroupRoom>();
  std::vector<uint64_t> row_keys(std::min({size, columns, kRowInCache}));
  room->row_keys = row_keys.data();
  with_each_capability([&] {
    std::ranges::fill(mask, uint8_t{2});
    EXPECT(PYPRUNE_KERNEL(mask_groups)(tile, *room) == 0);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t first = 0; first < columns; first += size) {
        const int64_t count = std::min(size, columns - first);
        const auto place = [&](int64_t i) { return row * steps.row + (first + i) * steps.column; };
        std::vector<double> scores(count);
        for (int64_t i = 0; i < count; ++i) {
          const Real magnitude = static_cast<Real>(std::fabs(value_of(dtype, weights[place(i)])));
          scores[i] = with_base && base[place(i)] == 0 ? -1
                      : with_factors                   ? static_cast<Real>(magnitude * factors[first + i])
                                                       : magnitude;
        }
        std::vector<int64_t> order(count);
        std::iota(order.begin(), order.end(), int64_t{0});
        std::ranges::stable_sort(order, {}, [&](int64_t i) { return scores[i]; });
        for (int64_t rank = 0; rank < count; ++rank) {
          const bool stays = rank >= count - kept && scores[order[rank]] >= 0;
          EXPECT(mask[place(order[rank])] == stays);
        }
      }
    }
  });
}

// Column after column, as the formula says; the same bits.
template <class Real>
void test_sparsegpt_block(int64_t rows, int64_t columns, int64_t kept, int64_t size) {
  const auto draw = [](int64_t count) {
    std::vector<Real> numbers(count);
    std::ranges::generate(numbers, [] { return std::normal_distribution<Real>(0, 1)(random_bits); });
    return numbers;
  };
  const std::vector<Real> weight = draw(rows * columns), sums = draw(rows * columns);
  std::vector<Real> factor = draw(columns * columns);
  for (int64_t j = 0; j < columns; ++j) {
    factor[j * columns + j] = 2 + std::fabs(factor[j * columns + j]);
  }
  std::vector<uint8_t> mask(rows * columns);
  std::ranges::generate(mask, [] { return static_cast<uint8_t>(random_between(0, 3) != 0); });
  std::vector<Real> left = weight, lost = sums;
  std::vector<uint8_t> stays = mask;
  for (int64_t row = 0; row < rows; ++row) {
    Real *const w = &left[row * columns], *const d = &lost[row * columns];
    const auto inverse = [&](int64_t j) { return 1 / factor[j * columns + j]; };
    const auto add = [&](Real* sum, int64_t i, int64_t end) {
      for (int64_t j = i + 1; j < end; ++j) {
        const Real product = sum[i] * factor[i * columns + j];
        sum[j] += product;
      }
    };
    for (int64_t j = 0; j < columns; ++j) {
      if (size > 0 && j % size == 0) {
        const int64_t end = std::min(j + size, columns);
        std::vector<Real> if_kept(d, d + end), scores(end);
        for (int64_t k = j; k < end; ++k) {
          const Real product = w[k] * factor[k * columns + k];
          scores[k] = stays[row * columns + k] == 0 ? -1 : std::fabs(product + if_kept[k]);
          if_kept[k] = -(if_kept[k] * inverse(k));
          add(if_kept.data(), k, end);
        }
        for (int64_t k = j; k < end; ++k) {
          int64_t beaten = 0;
          for (int64_t i = j; i < end; ++i) {
            beaten += i != k && (i < k ? scores[i] > scores[k] : scores[i] >= scores[k]);
          }
          stays[row * columns + k] = stays[row * columns + k] != 0 && beaten < kept;
        }
      }
      const Real if_kept = -(d[j] * inverse(j));
      const bool stay = stays[row * columns + j] != 0;
      d[j] = stay ? if_kept : w[j];
      w[j] = stay ? w[j] - if_kept : 0;
      add(d, j, columns);
    }
  }
  struct alignas(64) Line {
    char bytes[64];
  };
  constexpr Dtype kDtype = sizeof(Real) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
  std::vector<Real> packed(packed_count(columns));
  std::vector<Line> room(sparsegpt_room(columns) / sizeof(Line) + 1);
  with_each_capability([&] {
    std::vector<Real> w = weight, s = sums;
    std::vector<uint8_t> m = mask;
    PYPRUNE_KERNEL(pack_factor)(factor.data(), columns, kDtype, columns, size, packed.data());
    PYPRUNE_KERNEL(sparsegpt_rows)
    ({kDtype, w.data(), s.data(), m.data(), columns, columns, columns, rows, columns, kept, size}, packed.data(),
     room.data());
    EXPECT(w == left && s == lost);
    EXPECT(m == stays);
  });
}

template <class Visit>
void by_size(Dtype dtype, const Visit& visit) {
  by_bits(dtype, [&](auto zero) { visit(zero); });
}

void run() {
  for (const Dtype dtype : kFloats) {
    by_size(dtype, [&]<class Bits>(Bits) {
      for (const int64_t length : kLengths) {
        test_elementwise<Bits>(dtype, length);
        test_counts<Bits>(dtype, length);
      }
    });
  }
  for (const int64_t length : kLengths) {
    test_crc32(length);
    for (const int percent : {0, 50, 95, 100}) {
      test_pack<uint8_t>(length, percent);
      test_pack<uint16_t>(length, percent);
      test_pack<uint32_t>(length, percent);
      test_pack<uint64_t>(length, percent);
    }
    test_noise(std::min(length, kGateBlock));
    for (const GateRule rule : {GateRule::kBernoulli, GateRule::kHardConcrete, GateRule::kStraightThrough}) {
      for (const double beta : {kUsualBeta, 0.5}) {
        for (const bool sampled : {false, true}) {
          test_gate<float>({rule, sampled, beta, -0.1, 1.1}, std::min(length, kGateBlock));
          test_gate<double>({rule, sampled, beta, -0.1, 1.1}, std::min(length, kGateBlock));
        }
      }
    }
  }
  for (const Dtype dtype : kFloats) {
    by_size(dtype, [&]<class Bits>(Bits) {
      for (const int64_t size : {1, 2, 4, 5, 8, 16, 33, 64}) {
        for (const int64_t columns : {1, 7, 64, 200, 1003}) {
          for (const int option : {0, 1, 2, 3, 4, 5, 6, 7}) {
            test_groups<Bits>(dtype, option % 3 == 0 ? 9 : 70, columns, size, option & 1, option & 2, option & 4);
          }
        }
      }
      for (const int64_t size : {65, 100, 1000, 5000}) {
        for (const int64_t columns : {64, 1003, 70'000}) {
          for (const int option : {0, 1, 2, 3}) {
            test_groups<Bits>(dtype, 2, columns, columns > 5000 ? columns : size, false, option & 1, option & 2);
          }
        }
      }
    });
  }
  for (const auto& [kept, size] : {std::pair{0, 0}, {2, 4}, {1, 2}, {2, 5}, {3, 8}, {30, 64}}) {
    for (const int64_t columns : {1, 4, 7, 64, 129}) {
      for (const int64_t rows : {1, 8, 33, 64}) {
        test_sparsegpt_block<float>(rows, columns, kept, size);
        test_sparsegpt_block<double>(rows, columns, kept, size);
      }
    }
  }
  test_segments({64, 3, 7, 7}, {64, 1, 1, 1});
  test_segments({64, 30, 3, 3}, {1, 30, 1, 1});
  test_segments({768, 100}, {12, 1});
  test_segments({64, 96}, {16, 24});
  test_segments({300, 700}, {1, 1});
  test_segments({50'000, 4}, {1, 4});
  test_segments({4, 3000}, {4, 2});
  test_segments({2, 8, 6, 10}, {1, 4, 2, 5});
}

}  // namespace
}  // namespace pyprune::test

int main() {
  pyprune::test::run();
  std::puts("kernels_test: passed");
}
