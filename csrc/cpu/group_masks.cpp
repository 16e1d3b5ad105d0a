// group_masks: tensors to tiles of rows, shared by the threads.
#include "kernels/group_masks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>

#include "capability.h"
#include "denormals.h"
#include "parallel.h"
#include "select.h"
#include "tensors.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

// A group that is worth all threads, and more than the caches hold.
constexpr int64_t kGiantGroup = int64_t{1} << 20;
// A multiple of it in elements keeps masks aligned.
constexpr int64_t kMaskAlignment = 64;
// Rows that are next to each other in memory and are worked on together.
constexpr int64_t kRowsTogether = 1024;

// A tensor as rows and columns.
struct Matrix {
  Matrix(const Tensor& tensor, int64_t row_dims)
      : all(strided_of(tensor)),
        rows(nullptr, all.dtype, tensor.sizes().data(), tensor.strides().data(), row_dims),
        columns(nullptr, all.dtype, tensor.sizes().data() + row_dims, tensor.strides().data() + row_dims,
                tensor.dim() - row_dims) {}

  bool has_steps() const { return columns.sizes.size() <= 1; }
  // From one row to the next within `inner_rows`, and from one column to the next.
  Steps steps() const {
    return {rows.sizes.empty() ? 0 : rows.strides.back(), columns.sizes.empty() ? 1 : columns.strides.back()};
  }
  int64_t inner_rows() const { return rows.sizes.empty() ? 1 : rows.sizes.back(); }

  char* at(int64_t row, int64_t column) const {
    return all.data + (rows.offset(row) + columns.offset(column)) * item_size(all.dtype);
  }
  // Some elements of a row: all of it, unless it has steps.
  Strided part(int64_t row, int64_t column, int64_t count) const {
    const int64_t step = steps().column;
    return has_steps() ? Strided(at(row, column), all.dtype, &count, &step, 1)
                       : Strided(at(row, 0), all.dtype, columns.sizes.data(), columns.strides.data(),
                                 static_cast<int64_t>(columns.sizes.size()));
  }

  Strided all, rows, columns;
};

// A weight and what belongs to it.
struct Groups {
  Matrix weight, mask;
  std::optional<Matrix> base;
  std::vector<uint64_t> factors;  // floats, or doubles for float64; empty if there are none
  int64_t size, kept;
  int64_t rows, columns;
  bool copied;         // tiles are copied to where their columns are one after the other
  int64_t inner_rows;  // so many rows have one step between them, in all tensors
};

// Some rows of one weight, and some columns of these.
struct Task {
  int64_t tensor;
  int64_t row, rows;
  int64_t column, columns;
};

struct Worker {
  std::unique_ptr<GroupRoom> room;
  Room weight, mask, base, row_keys;
};

template <class Real>
void clean(Real* factors, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    factors[i] = factors[i] >= 0 && std::isfinite(factors[i]) ? factors[i] : Real{0};
  }
}

std::vector<uint64_t> factors_of(const std::optional<Tensor>& tensor, Dtype weight, int64_t columns) {
  if (!tensor.has_value()) {
    return {};
  }
  const bool wide = weight == Dtype::kFloat64;
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->numel() == columns &&
                      dtype_of(*tensor) == (wide ? Dtype::kFloat64 : Dtype::kFloat32),
                  "expected one factor per column, float64 for float64 weights and float32 for others");
  std::vector<uint64_t> factors(columns);
  strided_of(*tensor).gather(0, columns, factors.data());
  if (wide) {
    clean(reinterpret_cast<double*>(factors.data()), columns);
  } else {
    clean(reinterpret_cast<float*>(factors.data()), columns);
  }
  return factors;
}

Groups groups_of(const Tensor& weight, const Tensor& mask, const std::optional<Tensor>& base,
                 const std::optional<Tensor>& factors, int64_t size, int64_t kept, int64_t row_dims) {
  STD_TORCH_CHECK(0 <= row_dims && row_dims < weight.dim(), "row_dims must leave a dimension for the columns");
  STD_TORCH_CHECK(size >= 1 && 0 <= kept && kept <= size, "cannot keep ", kept, " of ", size);
  Groups groups{Matrix(weight, row_dims), Matrix(mask, row_dims), std::nullopt, {}, size, kept, 0, 0, false, 0};
  groups.rows = groups.weight.rows.numel;
  groups.columns = groups.weight.columns.numel;
  if (base.has_value()) {
    STD_TORCH_CHECK(dtype_of(*base) == Dtype::kBool && base->sizes().vec() == weight.sizes().vec(),
                    "a base is bool and has the shape of its weight");
    groups.base.emplace(*base, row_dims);
  }
  groups.factors = factors_of(factors, groups.weight.all.dtype, groups.columns);
  if (groups.weight.all.numel == 0) {
    return groups;
  }
  groups.inner_rows = groups.rows;
  for (const Matrix* matrix : {&groups.weight, &groups.mask, groups.base ? &*groups.base : nullptr}) {
    if (matrix != nullptr) {
      groups.inner_rows = std::min(groups.inner_rows, matrix->inner_rows());
      groups.copied |= !matrix->has_steps() || (size > kRankedSize && matrix->steps().column != 1);
    }
  }
  const bool dense = groups.weight.all.contiguous() && groups.mask.all.contiguous() &&
                     (!groups.base || groups.base->all.contiguous());
  if (dense && size <= kRankedSize && groups.columns % size == 0 && groups.factors.empty()) {
    // No group knows which row it is in.
    groups.columns *= groups.rows;
    groups.rows = groups.inner_rows = 1;
  }
  return groups;
}

// Cuts a weight into tasks of about a chunk.
void add_tasks(const Groups& groups, int64_t tensor, std::vector<Task>& tasks) {
  int64_t columns = groups.columns, rows = std::max<int64_t>(1, kChunk / columns);
  const bool columns_are_far = !groups.copied && groups.weight.steps().column > groups.weight.steps().row;
  if (groups.size <= kRankedSize) {
    if (columns_are_far) {
      rows = std::max(rows, std::min(groups.inner_rows, kRowsTogether));
    }
    const int64_t aligned = kMaskAlignment * groups.size;
    columns = std::min(columns, std::max(aligned, kChunk / rows / aligned * aligned));
  }
  for (int64_t row = 0; row < groups.rows; row += rows) {
    for (int64_t column = 0; column < groups.columns; column += columns) {
      tasks.push_back(
          {tensor, row, std::min(rows, groups.rows - row), column, std::min(columns, groups.columns - column)});
    }
  }
}

int64_t mask_task(const Groups& groups, const Task& task, Worker& worker) {
  const int64_t row_keys = std::min({groups.size, groups.columns, kRowInCache});
  const bool keys_differ = !groups.factors.empty() || groups.base.has_value();
  if (worker.room == nullptr) {
    worker.room = std::make_unique_for_overwrite<GroupRoom>();
  }
  if (groups.size > kRankedSize && keys_differ) {
    worker.row_keys.resize(std::max(worker.row_keys.size(), static_cast<size_t>(row_keys)));
    worker.room->row_keys = worker.row_keys.data();
  }
  GroupTile tile{};
  tile.dtype = groups.weight.all.dtype;
  if (!groups.factors.empty()) {
    tile.factors = reinterpret_cast<const char*>(groups.factors.data()) +
                   task.column * (tile.dtype == Dtype::kFloat64 ? sizeof(double) : sizeof(float));
  }
  tile.columns = task.columns;
  tile.size = groups.size;
  tile.kept = groups.kept;
  int64_t nonfinite = 0;
  const int64_t end = task.row + task.rows;
  for (int64_t row = task.row; row < end; row += tile.rows) {
    if (groups.copied) {
      tile.rows = task.columns == groups.columns ? end - row : 1;
      const int64_t start = row * groups.columns + task.column, count = tile.rows * task.columns;
      const Strided &weight = groups.weight.all, &mask = groups.mask.all;
      tile.weight_steps = tile.mask_steps = tile.base_steps = {task.columns, 1};
      tile.weight = weight.in_a_row(start, count, worker.weight);
      tile.mask = reinterpret_cast<uint8_t*>(mask.to_write(start, count, worker.mask));
      if (groups.base) {
        tile.base = reinterpret_cast<const uint8_t*>(groups.base->all.in_a_row(start, count, worker.base));
      }
      nonfinite += PYPRUNE_KERNEL(mask_groups)(tile, *worker.room);
      if (!mask.contiguous()) {
        mask.scatter(start, count, tile.mask);
      }
      continue;
    }
    tile.rows = std::min(end - row, groups.inner_rows - row % groups.inner_rows);
    tile.weight_steps = groups.weight.steps();
    tile.weight = groups.weight.at(row, task.column);
    tile.mask_steps = groups.mask.steps();
    tile.mask = reinterpret_cast<uint8_t*>(groups.mask.at(row, task.column));
    if (groups.base) {
      tile.base_steps = groups.base->steps();
      tile.base = reinterpret_cast<const uint8_t*>(groups.base->at(row, task.column));
    }
    nonfinite += PYPRUNE_KERNEL(mask_groups)(tile, *worker.room);
  }
  return nonfinite;
}

// Whether the groups are so large that each is a competition of its own.
bool giant(const Groups& groups) {
  const bool whole_rows = groups.size >= groups.columns;
  return std::min(groups.size, groups.columns) >= kGiantGroup && groups.factors.empty() && !groups.base &&
         (whole_rows || (groups.weight.has_steps() && groups.mask.has_steps()));
}

int64_t mask_giants(const Groups& groups) {
  int64_t nonfinite = 0;
  for (int64_t row = 0; row < groups.rows; ++row) {
    for (int64_t column = 0; column < groups.columns; column += groups.size) {
      const int64_t count = std::min(groups.size, groups.columns - column);
      Competition one{{groups.weight.part(row, column, count)}, {groups.mask.part(row, column, count)}, {}};
      one.wide = groups.weight.all.dtype == Dtype::kFloat64;
      one.removed = count - std::min(groups.kept, count);
      nonfinite += select_masks(one)[0];
    }
  }
  return nonfinite;
}

Tensor group_masks(const std::vector<Tensor> weights, const std::vector<int64_t> sizes,
                   const std::vector<int64_t> kept, const std::vector<int64_t> row_dims,
                   const std::vector<std::optional<Tensor>> factors, const std::vector<std::optional<Tensor>> bases,
                   const std::vector<Tensor> masks) {
  const KeepDenormals exact;
  check_weights(weights);
  check_masks(masks, weights);
  const size_t n = weights.size();
  STD_TORCH_CHECK(
      sizes.size() == n && kept.size() == n && row_dims.size() == n && factors.size() == n && bases.size() == n,
      "expected one of each per weight");
  Tensor result = torch::stable::empty({static_cast<int64_t>(n)}, torch::headeronly::ScalarType::Long);
  int64_t* const nonfinite = static_cast<int64_t*>(result.mutable_data_ptr());
  std::vector<Groups> all;
  std::vector<Task> tasks;
  int64_t elements = 0;
  for (size_t i = 0; i < n; ++i) {
    all.push_back(groups_of(weights[i], masks[i], bases[i], factors[i], sizes[i], kept[i], row_dims[i]));
    nonfinite[i] = 0;
    if (giant(all[i])) {
      nonfinite[i] = mask_giants(all[i]);
    } else if (all[i].weight.all.numel > 0) {
      add_tasks(all[i], static_cast<int64_t>(i), tasks);
      elements += all[i].weight.all.numel;
    }
  }
  std::vector<Worker> workers(thread_count());
  std::vector<int64_t> found(tasks.size());
  share_tasks(static_cast<int64_t>(tasks.size()), elements, [&](int64_t task, int64_t worker) {
    found[task] = mask_task(all[tasks[task].tensor], tasks[task], workers[worker]);
  });
  for (size_t task = 0; task < tasks.size(); ++task) {
    nonfinite[tasks[task].tensor] += found[task];
  }
  return result;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("group_masks", TORCH_BOX(&pyprune::group_masks));
}
