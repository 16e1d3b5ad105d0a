// count_sparse, fill_sparse, unpack_sparse, check_sparse: dense weights to lists of what is not zero
// (sparse_layout.h), some rows at a time, and back; and whether lists are well formed.
#include "kernels/pack_sparse.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "../sparse_check.h"
#include "capability.h"
#include "parallel.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

constexpr int64_t kRowsOfTask = 32;  // a multiple of the rows of every group

uint64_t significant_of(const Tensor& weight) {
  return value_type(weight) == SparseValue::kInt8 ? ~uint64_t{0}
                                                  : (uint64_t{1} << (8 * weight.element_size() - 1)) - 1;
}

// Calls run(rows) for tasks of some rows of a weight, which begins with row `first` of the whole.
template <class Run>
void by_rows(const Tensor& weight, int64_t first, const Run& run) {
  const int64_t rows = weight.size(0), columns = weight.size(1), size = weight.element_size();
  share_tasks((rows + kRowsOfTask - 1) / kRowsOfTask, rows * columns, [&](int64_t task, int64_t) {
    const int64_t row = task * kRowsOfTask;
    run(DenseRows{static_cast<const char*>(weight.const_data_ptr()) + row * columns * size, size,
                  significant_of(weight), first + row, std::min(kRowsOfTask, rows - row)},
        row);
  });
}

void check_weight(const Tensor& weight) {
  value_type(weight);
  check_on_cpu(weight);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight must be a contiguous matrix");
}

Tensor count_sparse(const Tensor weight, int64_t layout, int64_t blocks) {
  check_weight(weight);
  const SparseShape shape = checked_shape(layout, weight.size(0), weight.size(1), blocks);
  const int64_t lists = shape.lists();
  Tensor counts = torch::stable::new_empty(weight, {&lists, 1}, torch::headeronly::ScalarType::Int);
  int32_t* const data = static_cast<int32_t*>(counts.mutable_data_ptr());
  by_rows(weight, 0, [&, run = PYPRUNE_KERNEL(count_lists)](const DenseRows& rows, int64_t row) {
    run(shape, rows, data + row / shape.rows_of_group(), shape.groups());
  });
  return counts;
}

void fill_sparse(const Tensor weight, int64_t layout, const Tensor offsets, int64_t rows, int64_t first_row,
                 const Tensor values, const Tensor index) {
  check_weight(weight);
  const SparseShape shape = packed_shape(values, index, offsets, layout, rows, weight.size(1));
  STD_TORCH_CHECK(value_type(values) == value_type(weight), "values and weight differ in dtype");
  STD_TORCH_CHECK(first_row >= 0 && first_row % shape.rows_of_group() == 0 && first_row + weight.size(0) <= rows &&
                      (weight.size(0) % shape.rows_of_group() == 0 || first_row + weight.size(0) == rows),
                  "rows must begin and end with a group");
  const int32_t* const starts = static_cast<const int32_t*>(offsets.const_data_ptr());
  const int64_t entries = entries_of(values, shape);
  for (int64_t list = 0; list < shape.lists(); ++list) {
    STD_TORCH_CHECK(0 <= starts[list] && starts[list] <= starts[list + 1] && starts[list + 1] <= entries,
                    "offsets must grow, up to the number of entries");
  }
  std::atomic<bool> fits{true};
  by_rows(weight, first_row, [&, run = PYPRUNE_KERNEL(fill_lists)](const DenseRows& some, int64_t) {
    if (!run(shape, some, starts, values.mutable_data_ptr(), static_cast<uint8_t*>(index.mutable_data_ptr()))) {
      fits = false;
    }
  });
  STD_TORCH_CHECK(fits, "offsets do not fit the weight");
}

SparseFault fault_of(const Tensor& values, const Tensor& index, const Tensor& offsets, const SparseShape& shape) {
  const int32_t* const starts = static_cast<const int32_t*>(offsets.const_data_ptr());
  const int64_t entries = entries_of(values, shape), lists = shape.lists();
  if (starts[0] != 0 || starts[lists] != entries) {
    return SparseFault::kOffset;
  }
  std::atomic<SparseFault> fault{SparseFault::kNone};
  constexpr int64_t kTogether = 1024;
  share_tasks((lists + kTogether - 1) / kTogether, lists + entries, [&](int64_t task, int64_t) {
    const int64_t first = task * kTogether;
    const SparseFault found =
        PYPRUNE_KERNEL(check_lists)(shape, first, std::min(kTogether, lists - first), starts, entries,
                                    static_cast<const uint8_t*>(index.const_data_ptr()));
    if (found != SparseFault::kNone) {
      fault = found;
    }
  });
  return fault;
}

Tensor check_sparse(const Tensor values, const Tensor index, const Tensor offsets, int64_t layout, int64_t rows,
                    int64_t columns) {
  const SparseShape shape = packed_shape(values, index, offsets, layout, rows, columns);
  const int64_t one = 1;
  Tensor result = torch::stable::new_empty(offsets, {&one, 1}, torch::headeronly::ScalarType::Long);
  *static_cast<int64_t*>(result.mutable_data_ptr()) = static_cast<int64_t>(fault_of(values, index, offsets, shape));
  return result;
}

Tensor unpack_sparse(const Tensor values, const Tensor index, const Tensor offsets, int64_t layout, int64_t rows,
                     int64_t columns) {
  const SparseShape shape = packed_shape(values, index, offsets, layout, rows, columns);
  STD_TORCH_CHECK(fault_of(values, index, offsets, shape) == SparseFault::kNone, "the packed weight is damaged");
  const int64_t sizes[] = {rows, columns};
  Tensor dense = torch::stable::new_empty(values, {sizes, 2}, std::nullopt);
  const int64_t together = kRowsOfTask / shape.rows_of_group(), groups = shape.groups();
  share_tasks((groups + together - 1) / together, rows * columns, [&](int64_t task, int64_t) {
    PYPRUNE_KERNEL(unpack_lists)
    (shape, task * together, std::min(together, groups - task * together),
     static_cast<const int32_t*>(offsets.const_data_ptr()), values.const_data_ptr(), values.element_size(),
     static_cast<const uint8_t*>(index.const_data_ptr()), dense.mutable_data_ptr());
  });
  return dense;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("count_sparse", TORCH_BOX(&pyprune::count_sparse));
  m.impl("fill_sparse", TORCH_BOX(&pyprune::fill_sparse));
  m.impl("unpack_sparse", TORCH_BOX(&pyprune::unpack_sparse));
  m.impl("check_sparse", TORCH_BOX(&pyprune::check_sparse));
}
