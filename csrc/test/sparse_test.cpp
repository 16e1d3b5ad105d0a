// Kernels of packed weights without torch and Python, against the plainest loops, and with damaged lists: meant to
// run under sanitizers (make test-cpp). Memory is as large as it must be.
#include <algorithm>
#include <cmath>
#include <memory>

#include "../cpu/kernels/pack_sparse.h"
#include "../cpu/kernels/sparse_block.h"
#include "../cpu/kernels/sparse_panel.h"
#include "../cpu/kernels/sparse_rows.h"
#include "check.h"

namespace pyprune::test {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Memory as torch aligns it, and not a byte more.
template <class T>
std::unique_ptr<T[], Free> aligned(int64_t count, T value) {
  T* data = nullptr;
  if (posix_memalign(reinterpret_cast<void**>(&data), 64, std::max<int64_t>(1, count * sizeof(T))) != 0) std::abort();
  std::fill_n(data, count, value);
  return std::unique_ptr<T[], Free>(data);
}

struct Weight {
  SparseShape shape;
  SparseValue type;
  std::vector<char> dense;  // bits of the type
  std::unique_ptr<char[], Free> values;
  std::unique_ptr<uint8_t[], Free> index;
  std::unique_ptr<int32_t[], Free> offsets;
  int64_t entries, size;

  double value(int64_t row, int64_t column) const {
    const char* const at = dense.data() + (row * shape.columns + column) * size;
    switch (type) {
      case SparseValue::kFloat32: return *reinterpret_cast<const float*>(at);
      case SparseValue::kInt8: return *reinterpret_cast<const int8_t*>(at);
      case SparseValue::kBFloat16: return bfloat16_to_float(*reinterpret_cast<const uint16_t*>(at));
      default: return float16_to_float(*reinterpret_cast<const uint16_t*>(at));
    }
  }
  SparseLists lists(int64_t block, int64_t first, int64_t groups) const {
    return {shape, type, values.get(), index.get(), offsets.get(), entries, block, first, groups};
  }
};

Weight random_weight(SparseLayout layout, SparseValue type, int64_t rows, int64_t columns, int64_t blocks,
                     int percent) {
  const int64_t size = type == SparseValue::kFloat32 ? 4 : type == SparseValue::kInt8 ? 1 : 2;
  Weight weight{sparse_shape(layout, rows, columns, blocks),
                type,
                std::vector<char>(rows * columns * size),
                {},
                {},
                {},
                0,
                size};
  EXPECT(weight.shape.is_possible());
  for (int64_t i = 0; i < rows * columns; ++i) {
    const float x = random_between(0, 99) < percent ? 0 : static_cast<float>(random_between(-127, 127)) / 64;
    char* const at = weight.dense.data() + i * size;
    switch (type) {
      case SparseValue::kFloat32: *reinterpret_cast<float*>(at) = x; break;
      case SparseValue::kInt8: *at = static_cast<char>(x * 64); break;
      case SparseValue::kBFloat16: *reinterpret_cast<uint16_t*>(at) = float_to_bfloat16(x); break;
      default: *reinterpret_cast<uint16_t*>(at) = float_to_float16(x);
    }
  }
  const SparseShape& shape = weight.shape;
  const DenseRows dense{weight.dense.data(), size,
                        type == SparseValue::kInt8 ? ~uint64_t{0} : (uint64_t{1} << (8 * size - 1)) - 1, 0, rows};
  std::vector<int32_t> counts(shape.lists());
  PYPRUNE_KERNEL(count_lists)(shape, dense, counts.data(), shape.groups());
  weight.offsets = aligned<int32_t>(shape.lists() + 1, 0);
  for (int64_t list = 0; list < shape.lists(); ++list) {
    weight.offsets[list + 1] = weight.offsets[list] + counts[list];
  }
  weight.entries = weight.offsets[shape.lists()];
  weight.values = aligned<char>(shape.value_count(weight.entries) * size, 0);
  weight.index = aligned<uint8_t>(shape.index_bytes(weight.entries), 0);
  EXPECT(PYPRUNE_KERNEL(fill_lists)(shape, dense, weight.offsets.get(), weight.values.get(), weight.index.get()));
  EXPECT(PYPRUNE_KERNEL(check_lists)(shape, 0, shape.lists(), weight.offsets.get(), weight.entries,
                                     weight.index.get()) == SparseFault::kNone);
  std::vector<char> back(weight.dense.size());
  PYPRUNE_KERNEL(unpack_lists)
  (shape, 0, shape.groups(), weight.offsets.get(), weight.values.get(), size, weight.index.get(), back.data());
  EXPECT(back == weight.dense);
  return weight;
}

// Activations [rows][columns] times the weight, with bias and scale, as the driver does it.
std::vector<float> product(const Weight& weight, const std::vector<float>& x, int64_t rows, int64_t lanes,
                           const Epilogue& epilogue) {
  const SparseShape& shape = weight.shape;
  const int64_t count = shape.groups() * shape.rows_of_group(), width = lanes == 1 ? rows : lanes;
  // A byte or, in other layouts, no column at all can point beyond the block.
  const int64_t columns = lanes == 1 ? (shape.width + 16) / 16 * 16
                                     : std::max(shape.width + 1, shape.index_size() == 1 ? int64_t{257} : int64_t{0});
  const auto sums = aligned<float>(count * width, 0);
  std::vector<float> out(rows * shape.rows);
  Activations to{Dtype::kFloat32, out.data(), shape.rows, rows};
  for (int64_t block = 0; block < shape.blocks; ++block) {
    const int64_t first = block * shape.width, some = shape.columns_of(block);
    const int64_t step = lanes == 1 ? std::max<int64_t>(columns, 272) : columns;
    const auto panel = aligned<float>(step * width, 1e9f);
    for (int64_t row = 0; row < (lanes == 1 ? rows : 1); ++row) {
      const Activations from{Dtype::kFloat32, const_cast<float*>(x.data()) + row * shape.columns, shape.columns,
                             lanes == 1 ? 1 : rows};
      PYPRUNE_KERNEL(pack_panel)(from, first, some, shape.width, lanes, panel.get() + row * step);
    }
    const SparseLists lists = weight.lists(block, 0, shape.groups());
    if (lanes == 1) {
      PYPRUNE_KERNEL(add_lists_to_rows)(lists, {panel.get(), step, rows}, sums.get(), count);
    } else {
      PYPRUNE_KERNEL(add_lists)(lists, panel.get(), lanes, sums.get());
    }
  }
  if (lanes > 1) {
    PYPRUNE_KERNEL(finish_sums)(sums.get(), lanes, epilogue, 0, shape.rows, to);
  }
  for (int64_t row = 0; lanes == 1 && row < rows; ++row) {
    to = {Dtype::kFloat32, out.data() + row * shape.rows, shape.rows, 1};
    PYPRUNE_KERNEL(finish_sums)(sums.get() + row * count, 1, epilogue, 0, shape.rows, to);
  }
  return out;
}

template <class Use>
void for_all_sizes(const SparseShape& shape, const Use& use) {
  for (const int64_t rows : {1, 2, 3, 5, 8}) {
    if (rows <= PYPRUNE_KERNEL(most_rows)(shape.layout)) use(rows, int64_t{1});
  }
  for (int64_t lanes = PYPRUNE_KERNEL(least_lanes)(); lanes <= kMostLanes; lanes *= 2) {
    use(lanes, lanes);
    use(lanes - 3, lanes);
  }
}

std::vector<float> random_floats(int64_t count) {
  std::vector<float> x(count);
  std::ranges::generate(x, [] { return static_cast<float>(random_between(-64, 64)) / 16; });
  return x;
}

// Numbers are such that all sums are exact.
void test_products(SparseLayout layout, SparseValue type, int64_t rows, int64_t columns, int64_t blocks,
                   int percent) {
  with_each_capability([&] {
    const Weight weight = random_weight(layout, type, rows, columns, blocks, percent);
    const std::vector<float> bias = random_floats(rows), scale(rows, 0.5f);
    for_all_sizes(weight.shape, [&](int64_t batch, int64_t lanes) {
      const std::vector<float> x = random_floats(batch * columns);
      const auto found = product(weight, x, batch, lanes, {scale.data(), bias.data(), Activation::kNone});
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t row = 0; row < rows; ++row) {
          double sum = 0;
          for (int64_t column = 0; column < columns; ++column) {
            sum += weight.value(row, column) * x[b * columns + column];
          }
          EXPECT(std::fabs(found[b * rows + row] - (sum * 0.5 + bias[row])) <= 1e-4 * (1 + std::fabs(sum)));
        }
      }
    });
  });
}

// Any bytes at all for offsets and index: what comes out is nonsense, but nothing is read outside, and most is found.
void test_damage(SparseLayout layout, SparseValue type, int64_t columns, int64_t blocks) {
  with_each_capability([&] {
    Weight weight = random_weight(layout, type, 13, columns, blocks, 50);
    const SparseShape& shape = weight.shape;
    const bool all = random_between(0, 1) != 0;
    for (int64_t i = 0; i <= shape.lists(); ++i) {
      if (all || random_between(0, 9) == 0) {
        weight.offsets[i] = random_between(0, 1) != 0 ? static_cast<int32_t>(random_bits())
                                                      : static_cast<int32_t>(random_between(0, weight.entries));
      }
    }
    for (int64_t i = 0; i < shape.index_bytes(weight.entries); ++i) {
      if (random_between(0, 3) == 0) weight.index[i] = static_cast<uint8_t>(random_bits());
    }
    PYPRUNE_KERNEL(check_lists)
    (shape, 0, shape.lists(), weight.offsets.get(), weight.entries, weight.index.get());
    for_all_sizes(shape, [&](int64_t batch, int64_t lanes) {
      product(weight, random_floats(batch * columns), batch, lanes, {nullptr, nullptr, Activation::kRelu});
    });
  });
}

void test_panels(Dtype dtype, int64_t rows, int64_t columns, int64_t lanes) {
  const int64_t size = item_size(dtype);
  with_each_capability([&] {
    std::vector<char> data(rows * columns * size), back(rows * columns * size);
    const std::vector<float> x = random_floats(rows * columns);
    for (int64_t i = 0; i < rows * columns; ++i) {
      if (size == 4) {
        reinterpret_cast<float*>(data.data())[i] = x[i];
      } else {
        reinterpret_cast<uint16_t*>(data.data())[i] =
            dtype == Dtype::kFloat16 ? float_to_float16(x[i]) : float_to_bfloat16(x[i]);
      }
    }
    const int64_t width = columns + random_between(0, 9);
    const auto panel = aligned<float>((width + 1) * lanes, 7);
    PYPRUNE_KERNEL(pack_panel)({dtype, data.data(), columns, rows}, 0, columns, width, lanes, panel.get());
    for (int64_t i = 0; i < (width + 1) * lanes; ++i) {
      const int64_t column = i / lanes, lane = i % lanes;
      EXPECT(panel[i] == (column < columns && lane < rows ? x[lane * columns + column] : 0));
    }
    PYPRUNE_KERNEL(finish_sums)
    (panel.get(), lanes, {nullptr, nullptr, Activation::kNone}, 0, columns, {dtype, back.data(), columns, rows});
    EXPECT(back == data);
  });
}

void run() {
  for (const SparseLayout layout :
       {SparseLayout::kIndex, SparseLayout::kBitmask, SparseLayout::kRows, SparseLayout::kBlock4}) {
    for (const SparseValue type :
         {SparseValue::kFloat32, SparseValue::kBFloat16, SparseValue::kFloat16, SparseValue::kInt8}) {
      for (const int64_t columns : {1, 8, 127, 300, 700}) {
        const bool bytes = layout == SparseLayout::kIndex || layout == SparseLayout::kBlock4;
        const int64_t fewest = layout == SparseLayout::kRows      ? 1
                               : layout == SparseLayout::kBitmask ? (columns + kMaskWidth - 1) / kMaskWidth
                                                                  : (columns + kWidest - 1) / kWidest;
        for (const int64_t blocks : {fewest, bytes ? (columns + 127) / 128 : fewest}) {
          for (const int percent : {0, 60, 95, 100}) {
            test_products(layout, type, percent == 60 ? 13 : 4, columns, blocks, percent);
          }
          for (int turn = 0; turn < 4; ++turn) {
            test_damage(layout, type, columns, blocks);
          }
        }
      }
    }
  }
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    for (const int64_t columns : {1, 5, 64, 130, 257, 600}) {
      for (const int64_t lanes : {1, 8, 16, 32, 64}) {
        test_panels(dtype, lanes, columns, lanes);
        test_panels(dtype, std::max<int64_t>(1, lanes - 5), columns, lanes);
      }
    }
  }
}

}  // namespace
}  // namespace pyprune::test

int main() {
  pyprune::test::run();
  std::puts("sparse_test: passed");
}
