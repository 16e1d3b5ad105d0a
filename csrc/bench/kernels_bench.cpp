// Microbenchmarks of the CPU kernels, one thread, without torch: bytes per second beside a copy (make bench-cpp).
#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../cpu/kernels/count_zeros.h"
#include "../cpu/kernels/fold.h"
#include "../cpu/kernels/gate.h"
#include "../cpu/kernels/gate_penalty.h"
#include "../cpu/kernels/group_masks.h"
#include "../cpu/kernels/norms.h"
#include "../cpu/kernels/pack.h"
#include "../cpu/kernels/pack_sparse.h"
#include "../cpu/kernels/sparse_block.h"
#include "../cpu/kernels/sparse_rows.h"
#include "../cpu/kernels/sparsegpt_block.h"
#include "../cpu/kernels/threshold.h"
#include "../cpu/kernels/unit_scores.h"
#include "../cpu/strided.h"
#include "bench.h"

namespace pyprune::bench {
namespace {

Array<float> normal(int64_t count) {
  Array<float> values = array(count, 0.0f);
  std::mt19937 random(1);
  std::normal_distribution<float> distribution;
  // A period of 64 Ki numbers is enough, and quickly made.
  std::generate_n(values.get(), std::min(count, kChunk), [&] { return distribution(random); });
  for (int64_t i = kChunk; i < count; ++i) {
    values[i] = values[i - kChunk];
  }
  return values;
}

// Calls run(start, size) for the blocks of a large array, as the drivers do.
template <class Run>
void blocks(int64_t count, int64_t block, const Run& run) {
  for (int64_t start = 0; start < count; start += block) {
    run(start, std::min(block, count - start));
  }
}

void add_copy() {
  add("copy", 8, [](int64_t count) {
    return [count, from = normal(count), to = array(count, 0.0f)] {
      std::memcpy(to.get(), from.get(), count * sizeof(float));
    };
  });
}

void add_masks() {
  add("threshold sweep float32", 5, [](int64_t count) {
    return [count, x = normal(count), mask = array<uint8_t>(count, 1), bits = array<uint32_t>(kChunk + 1, 0),
            positions = array<uint16_t>(kChunk + 1, 0)] {
      const auto sweep = PYPRUNE_KERNEL(sweep32);
      const uint32_t* const data = reinterpret_cast<const uint32_t*>(x.get());
      blocks(count, kChunk, [&](int64_t start, int64_t size) {
        // Magnitudes around 1, the bracket as wide as a sample leaves it: about one in 500.
        sweep(data + start, nullptr, mask.get() + start, size, {0x3f7fc000, 0x3f800000, 0x3f804000}, bits.get(),
              positions.get(), {});
      });
    };
  });
  add("fold float32", 9, [](int64_t count) {
    return [count, x = normal(count), mask = array<uint8_t>(count, 1)] {
      PYPRUNE_KERNEL(fold_run)(x.get(), mask.get(), x.get(), Dtype::kFloat32, count);
    };
  });
  add("count_zeros bool", 1, [](int64_t count) {
    return [count, mask = array<uint8_t>(count, 1)] {
      benchmark::DoNotOptimize(PYPRUNE_KERNEL(count_zeros_run)(mask.get(), Dtype::kBool, count));
    };
  });
  // Half of the bits are set; what is moved are elements and kept ones, besides an eighth of a byte.
  add("pack bfloat16", 3, [](int64_t count) {
    return [count, x = array<uint16_t>(count, 1), bits = array<uint8_t>(count / 8 + 1, 0x5a),
            values = array<uint16_t>(count, 0)] {
      benchmark::DoNotOptimize(PYPRUNE_KERNEL(count_bits)(bits.get(), count / 8));
      PYPRUNE_KERNEL(pack_values)(x.get(), 2, bits.get(), values.get(), count, count / 2);
    };
  });
  add("unpack bfloat16", 3, [](int64_t count) {
    return [count, x = array<uint16_t>(count, 1), bits = array<uint8_t>(count / 8 + 1, 0x5a),
            values = array<uint16_t>(count, 1)] {
      PYPRUNE_KERNEL(unpack_values)(bits.get(), values.get(), 2, x.get(), count, count / 2, true);
    };
  });
  add("norms float32", 4, [](int64_t count) {
    return [count, x = normal(count), sums = array(count / kNormBlock + 1, 0.0)] {
      PYPRUNE_KERNEL(sum_squares)(x.get(), Dtype::kFloat32, count, 1.0, sums.get());
    };
  });
}

void add_groups() {
  for (const auto& [name, size, kept] :
       {std::tuple{"2:4", 4, 2}, std::tuple{"4:8", 8, 4}, std::tuple{"8:16", 16, 8}}) {
    add(std::string("group_masks ") + name + " float32", 5, [size, kept](int64_t count) {
      return [size, kept, count, x = normal(count), mask = array<uint8_t>(count, 1),
              room = std::make_unique<GroupRoom>()] {
        blocks(count, kChunk, [&](int64_t start, int64_t part) {
          const Steps steps{part, 1};
          benchmark::DoNotOptimize(
              PYPRUNE_KERNEL(mask_groups)({Dtype::kFloat32, x.get() + start, nullptr, mask.get() + start, steps,
                                           steps, steps, nullptr, 1, part, size, kept},
                                          *room));
        });
      };
    });
  }
}

void add_sparsegpt() {
  // Rows of 128 columns; a row is moved once, and 64 multiply-adds are made for each of its elements.
  constexpr int64_t kColumns = 128;
  for (const auto& [name, size, kept] : {std::tuple{"given mask", 0, 0}, std::tuple{"2:4", 4, 2}}) {
    add(std::string("sparsegpt_block ") + name + " float32", 18, [size, kept](int64_t count) {
      Array<float> factor = normal(kColumns * kColumns), packed = array(packed_count(kColumns), 0.0f);
      for (int64_t j = 0; j < kColumns; ++j) {
        factor[j * kColumns + j] = 20;
      }
      PYPRUNE_KERNEL(pack_factor)(factor.get(), kColumns, Dtype::kFloat32, kColumns, size, packed.get());
      return [size, kept, count, packed = std::move(packed), x = normal(count), sums = array(count, 0.0f),
              mask = array<uint8_t>(count, 1), room = array<char>(sparsegpt_room(kColumns), 0)] {
        PYPRUNE_KERNEL(sparsegpt_rows)
        ({Dtype::kFloat32, x.get(), sums.get(), mask.get(), kColumns, kColumns, kColumns, count / kColumns, kColumns,
          kept, size},
         packed.get(), room.get());
      };
    });
  }
}

// A packed weight of 1024 columns, of which so many percent are zero.
struct Packed {
  Packed(SparseLayout layout, int64_t blocks, int64_t count, int percent) {
    const Array<float> numbers = normal(count);
    std::mt19937 random(1);
    dense.resize(count);  // four rows alike, for block4
    for (int64_t row = 0; row < count / kColumns; row += 4) {
      for (int64_t column = 0; column < kColumns; ++column) {
        if (static_cast<int>(random() % 100) < percent) continue;
        for (int64_t k = 0; k < 4; ++k) {
          dense[(row + k) * kColumns + column] = 1 + numbers[row * kColumns + column] / 8;
        }
      }
    }
    shape = sparse_shape(layout, count / kColumns, kColumns, blocks);
    const DenseRows rows{dense.data(), 4, 0x7fffffff, 0, shape.rows};
    std::vector<int32_t> counts(shape.lists());
    PYPRUNE_KERNEL(count_lists)(shape, rows, counts.data(), shape.groups());
    offsets.push_back(0);
    for (const int32_t some : counts) {
      offsets.push_back(offsets.back() + some);
    }
    values.resize(shape.value_count(offsets.back()));
    index.resize(shape.index_bytes(offsets.back()));
    PYPRUNE_KERNEL(fill_lists)(shape, rows, offsets.data(), values.data(), index.data());
  }
  SparseLists block(int64_t number) const {
    return {shape, SparseValue::kFloat32, values.data(), index.data(), offsets.data(), offsets.back(), number,
            0,     shape.groups()};
  }

  static constexpr int64_t kColumns = 1024;
  SparseShape shape;
  std::vector<float> dense, values;
  std::vector<uint8_t> index;
  std::vector<int32_t> offsets;
};

// Of all weights a fifth is kept; bytes are those of the dense weight, a multiply-add per lane is made for each kept.
void add_sparse() {
  for (const auto& [name, layout, blocks] :
       {std::tuple{"index", SparseLayout::kIndex, 5}, std::tuple{"bitmask", SparseLayout::kBitmask, 4},
        std::tuple{"rows", SparseLayout::kRows, 1}, std::tuple{"block4", SparseLayout::kBlock4, 5}}) {
    for (const int64_t lanes : {1, 16, 64}) {
      add(std::string("sparse product ") + name + ", " + std::to_string(lanes) + " rows", 4,
          [layout, blocks, lanes](int64_t count) {
            const auto packed = std::make_shared<Packed>(layout, blocks, std::max<int64_t>(count, 4096), 80);
            const int64_t columns = (packed->shape.width + 16) / 16 * 16;
            return [packed, columns, lanes, panel = array((columns * packed->shape.blocks + 256) * lanes, 1.0f),
                    sums = array(packed->shape.rows * lanes, 0.0f)] {
              for (int64_t block = 0; block < packed->shape.blocks; ++block) {
                const float* const part = panel.get() + block * columns * lanes;
                if (lanes == 1) {
                  PYPRUNE_KERNEL(add_lists_to_rows)
                  (packed->block(block), {part, 0, 1}, sums.get(), packed->shape.rows);
                } else {
                  PYPRUNE_KERNEL(add_lists)(packed->block(block), part, lanes, sums.get());
                }
              }
            };
          });
    }
  }
}

void add_units() {
  // Units of 4096 neighbours, and of 64 rows of 64.
  add("unit_scores of rows float32", 4, [](int64_t count) {
    return [count, x = normal(count), sums = array(count / 4096, 0.0)] {
      PYPRUNE_KERNEL(sum_units)
      (x.get(), Dtype::kFloat32, {UnitPower::kMagnitude}, 4096, 1, 16, count / 4096, sums.get());
    };
  });
  add("unit_scores of columns float32", 4, [](int64_t count) {
    return [count, x = normal(count), sums = array(count / 64, 0.0)] {
      PYPRUNE_KERNEL(sum_units)
      (x.get(), Dtype::kFloat32, {UnitPower::kMagnitude}, 64, 64, 1, count / 4096, sums.get());
    };
  });
}

void add_gates() {
  add("gate noise", 4, [](int64_t count) {
    return [count, words = array<uint32_t>(kGateBlock, 0)] {
      const auto draw = PYPRUNE_KERNEL(draw_words);
      blocks(count, kGateBlock, [&](int64_t start, int64_t size) { draw({1, 2}, start, size, words.get()); });
    };
  });
  for (const auto& [name, rule] :
       {std::pair{"Bernoulli", GateRule::kBernoulli}, std::pair{"hard concrete", GateRule::kHardConcrete}}) {
    const Gate gate{rule, true, kUsualBeta, -0.1, 1.1};
    add(std::string("gate forward ") + name, 12, [gate](int64_t count) {
      return [gate, count, w = normal(count), m = normal(count), out = array(count, 0.0f)] {
        const GateRow row{gate, {1, 2}, Dtype::kFloat32, Dtype::kFloat32, 0, count, w.get(), m.get()};
        PYPRUNE_KERNEL(gate_forward)(row, out.get());
      };
    });
    add(std::string("gate backward ") + name, 20, [gate](int64_t count) {
      return [gate, count, w = normal(count), m = normal(count), g = normal(count), grad_w = array(count, 0.0f),
              grad_m = array(count, 0.0f)] {
        const GateRow row{gate, {1, 2}, Dtype::kFloat32, Dtype::kFloat32, 0, count, w.get(), m.get()};
        PYPRUNE_KERNEL(gate_backward)(row, g.get(), grad_w.get(), grad_m.get());
      };
    });
  }
  add("gate_penalty forward", 4, [](int64_t count) {
    return [count, m = normal(count)] {
      benchmark::DoNotOptimize(PYPRUNE_KERNEL(penalty_sum)(Dtype::kFloat32, m.get(), true, 0.0, count));
    };
  });
  add("gate_penalty backward", 8, [](int64_t count) {
    return [count, m = normal(count), out = array(count, 0.0f)] {
      PYPRUNE_KERNEL(penalty_slopes)(Dtype::kFloat32, m.get(), 0.0, 1.0, count, out.get());
    };
  });
}

}  // namespace
}  // namespace pyprune::bench

int main(int argc, char** argv) {
  pyprune::bench::add_copy();
  pyprune::bench::add_masks();
  pyprune::bench::add_groups();
  pyprune::bench::add_sparsegpt();
  pyprune::bench::add_sparse();
  pyprune::bench::add_units();
  pyprune::bench::add_gates();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
    return 1;
  }
  benchmark::RunSpecifiedBenchmarks();
}
