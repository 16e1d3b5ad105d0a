// sparse_linear: activations are laid out as panels once, then rows of the weight are shared by the threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../sparse_check.h"
#include "capability.h"
#include "denormals.h"
#include "kernels/sparse_block.h"
#include "kernels/sparse_panel.h"
#include "kernels/sparse_rows.h"
#include "parallel.h"

namespace pyprune {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPanelFloats = int64_t{1} << 21;  // of the panels that are held at a time, if one is not more
constexpr int64_t kRowsTogether = 1024;             // whose sums stay in the second-level cache, with 64 lanes
constexpr int64_t kLineFloats = 16;

// Some rows of activations: side by side as lanes, or, with one lane, one after the other.
struct Tile {
  int64_t row, rows, lanes;

  int64_t width() const { return lanes == 1 ? rows : lanes; }
};

std::vector<Tile> tiles_of(int64_t rows, SparseLayout layout) {
  if (rows <= PYPRUNE_KERNEL(most_rows)(layout)) {
    return {{0, rows, 1}};
  }
  std::vector<Tile> tiles;
  for (int64_t row = 0; row < rows; row += kMostLanes) {
    const int64_t some = std::min(kMostLanes, rows - row);
    int64_t lanes = PYPRUNE_KERNEL(least_lanes)();
    while (lanes < some) {
      lanes *= 2;
    }
    tiles.push_back({row, some, lanes});
  }
  return tiles;
}

Tensor floats(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {&count, 1}, ScalarType::Float);
}

float* data_of(Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

Dtype activation_type(const Tensor& tensor) {
  const Dtype dtype = dtype_of(tensor);
  STD_TORCH_CHECK(dtype != Dtype::kFloat64 && dtype != Dtype::kBool, "input must be float32, bfloat16 or float16");
  return dtype;
}

// A row of numbers for the outputs as float32.
Tensor as_floats(const Tensor& row, int64_t count, const char* name) {
  check_on_cpu(row);
  STD_TORCH_CHECK(row.dim() == 1 && row.size(0) == count, name, " must have a number for each output");
  const Tensor dense = torch::stable::contiguous(row);
  Tensor result = floats(row, count);
  PYPRUNE_KERNEL(floats_of)
  ({activation_type(dense), const_cast<void*>(dense.const_data_ptr()), count, 1}, count, data_of(result));
  return result;
}

struct Call {
  SparseLists lists;
  Activations input, output;
  Epilogue epilogue;

  Activations rows_of(const Activations& all, int64_t row, int64_t rows) const {
    return {all.dtype, static_cast<char*>(all.data) + row * all.step * item_size(all.dtype), all.step, rows};
  }
  // Columns of the panel of a block, aligned to cache lines.
  int64_t block_columns(const Tile& tile) const {
    const int64_t all = lists.shape.width + 1;
    return tile.lanes == 1 ? (all + kLineFloats - 1) / kLineFloats * kLineFloats : all;
  }
  int64_t row_floats(const Tile& tile) const { return lists.shape.blocks * block_columns(tile); }
  int64_t panel_floats(const Tile& tile) const { return row_floats(tile) * tile.width(); }

  void pack(const Tile& tile, int64_t block, float* panel) const {
    const SparseShape& shape = lists.shape;
    const int64_t rows = tile.lanes == 1 ? 1 : tile.rows;
    for (int64_t row = 0; row < tile.rows; row += rows) {
      PYPRUNE_KERNEL(pack_panel)
      (rows_of(input, tile.row + row, rows), block * shape.width, shape.columns_of(block), shape.width, tile.lanes,
       panel + row * row_floats(tile) + block * block_columns(tile) * tile.lanes);
    }
  }

  void multiply(const Tile& tile, int64_t first, int64_t groups, const float* panel, float* sums) const {
    const SparseShape& shape = lists.shape;
    const int64_t height = shape.rows_of_group(), count = groups * height, row = first * height;
    const int64_t outputs = std::min(count, shape.rows - row);
    std::fill(sums, sums + count * tile.width(), 0.0f);
    SparseLists part = lists;
    part.first = first, part.groups = groups;
    for (part.block = 0; part.block < shape.blocks; ++part.block, panel += block_columns(tile) * tile.lanes) {
      if (tile.lanes == 1) {
        PYPRUNE_KERNEL(add_lists_to_rows)(part, {panel, row_floats(tile), tile.rows}, sums, count);
      } else {
        PYPRUNE_KERNEL(add_lists)(part, panel, tile.lanes, sums);
      }
    }
    const int64_t rows = tile.lanes == 1 ? 1 : tile.rows;
    for (int64_t i = 0; i < tile.rows; i += rows, sums += count) {
      PYPRUNE_KERNEL(finish_sums)
      (sums, tile.lanes, epilogue, row, outputs, rows_of(output, tile.row + i, rows));
    }
  }

  // Groups of a task: few if threads wait for work, otherwise as many as caches hold.
  int64_t groups_of_task(int64_t tiles, const Tile& tile) const {
    const int64_t threads = thread_count(), height = lists.shape.rows_of_group();
    const int64_t tasks = threads == 1 ? 1 : std::max<int64_t>(1, 2 * threads / tiles);
    const int64_t most = kRowsTogether * kMostLanes / std::max<int64_t>(tile.width(), 16);
    const int64_t rows = std::min(most, (lists.shape.rows + tasks - 1) / tasks);
    return std::max<int64_t>(1, (rows + 31) / 32 * 32 / height);
  }

  void run(const std::vector<Tile>& tiles, const Tensor& like) const {
    const SparseShape& shape = lists.shape;
    for (size_t first = 0, end; first < tiles.size(); first = end) {
      std::vector<int64_t> starts;
      int64_t size = 0, lanes = 0;
      for (end = first; end < tiles.size() && (end == first || size + panel_floats(tiles[end]) <= kPanelFloats);
           ++end) {
        starts.push_back(size);
        size += (panel_floats(tiles[end]) + kLineFloats - 1) / kLineFloats * kLineFloats;
        lanes += tiles[end].width();
      }
      const int64_t count = static_cast<int64_t>(end - first);
      // A byte can say column 255 of the last block.
      Tensor panels = floats(like, size + 256 * kMostLanes);
      float* const panel = data_of(panels);
      const int64_t columns = shape.blocks;
      share_tasks(count * columns, shape.columns * lanes / 4, [&](int64_t task, int64_t) {
        pack(tiles[first + task / columns], task % columns, panel + starts[task / columns]);
      });
      const int64_t groups = groups_of_task(count, tiles[first]), all = shape.groups();
      const int64_t tasks = (all + groups - 1) / groups;
      const int64_t room = groups * shape.rows_of_group() * tiles[first].width();
      Tensor rooms = floats(like, room * thread_count());
      const int64_t work = lists.entries * shape.rows_of_group() * (32 * count + lanes) / 48;
      share_tasks(count * tasks, work, [&](int64_t task, int64_t worker) {
        const int64_t group = task % tasks * groups;
        multiply(tiles[first + task / tasks], group, std::min(groups, all - group), panel + starts[task / tasks],
                 data_of(rooms) + worker * room);
      });
    }
  }
};

Tensor sparse_linear(const Tensor input, const Tensor values, const Tensor index, const Tensor offsets,
                     std::optional<Tensor> scale, std::optional<Tensor> bias, int64_t layout, int64_t out_features,
                     int64_t activation) {
  const KeepDenormals exact;
  check_on_cpu(input);
  const Dtype dtype = activation_type(input);
  STD_TORCH_CHECK(input.dim() >= 1, "input must have a dimension of columns");
  STD_TORCH_CHECK(0 <= activation && activation < kActivations, "activation is ", activation, "; there are ",
                  kActivations);
  std::vector<int64_t> sizes = input.sizes().vec();
  const int64_t columns = sizes.back();
  const SparseShape shape = packed_shape(values, index, offsets, layout, out_features, columns);
  STD_TORCH_CHECK((value_type(values) == SparseValue::kInt8) == scale.has_value(),
                  "int8 values need a scale for each row, others have none");
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < sizes.size(); ++d) {
    rows *= sizes[d];
  }
  sizes.back() = out_features;
  Tensor output = torch::stable::new_empty(input, {sizes.data(), sizes.size()}, std::nullopt);
  if (rows == 0 || out_features == 0) {
    return output;
  }
  Tensor dense = torch::stable::reshape(input, {rows, columns});
  if (columns > 1 && dense.stride(1) != 1) {
    dense = torch::stable::contiguous(dense);
  }
  std::optional<Tensor> scales, biases;
  if (scale.has_value()) scales = as_floats(*scale, out_features, "scale");
  if (bias.has_value()) biases = as_floats(*bias, out_features, "bias");
  const Call call{
      {shape, value_type(values), values.const_data_ptr(), static_cast<const uint8_t*>(index.const_data_ptr()),
       static_cast<const int32_t*>(offsets.const_data_ptr()), entries_of(values, shape), 0, 0, 0},
      {dtype, const_cast<void*>(dense.const_data_ptr()), dense.stride(0), rows},
      {dtype, output.mutable_data_ptr(), out_features, rows},
      {scales ? data_of(*scales) : nullptr, biases ? data_of(*biases) : nullptr,
       static_cast<Activation>(activation)}};
  call.run(tiles_of(rows, shape.layout), input);
  return output;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("sparse_linear", TORCH_BOX(&pyprune::sparse_linear));
}
