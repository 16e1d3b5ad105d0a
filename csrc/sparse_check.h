// What operators on packed weights take: enough is checked at each call that no kernel reads or writes outside of
// them, whatever is in them. Whether lists are well formed check_sparse says once.
#pragma once

#include "check.h"
#include "sparse_layout.h"

namespace pyprune {

inline SparseValue value_type(const torch::stable::Tensor& values) {
  using torch::headeronly::ScalarType;
  switch (values.scalar_type()) {
    case ScalarType::Float: return SparseValue::kFloat32;
    case ScalarType::BFloat16: return SparseValue::kBFloat16;
    case ScalarType::Half: return SparseValue::kFloat16;
    case ScalarType::Char: return SparseValue::kInt8;
    default: STD_TORCH_CHECK(false, "values must be float32, bfloat16, float16 or int8");
  }
}

inline SparseShape checked_shape(int64_t layout, int64_t rows, int64_t columns, int64_t blocks) {
  STD_TORCH_CHECK(0 <= layout && layout < kSparseLayouts, "layout is ", layout, "; there are ", kSparseLayouts);
  STD_TORCH_CHECK(rows >= 0 && columns >= 0 && blocks >= 0 && rows <= INT32_MAX && columns <= INT32_MAX,
                  "impossible shape");
  const SparseShape shape = sparse_shape(static_cast<SparseLayout>(layout), rows, columns, blocks);
  STD_TORCH_CHECK(rows == 0 || shape.is_possible(), blocks, " blocks of columns do not fit ", columns, " columns");
  return shape;
}

// Entries that lists may have: what is there but the slack.
inline int64_t entries_of(const torch::stable::Tensor& values, const SparseShape& shape) {
  return values.numel() / shape.rows_of_group() - shape.slack();
}

inline SparseShape packed_shape(const torch::stable::Tensor& values, const torch::stable::Tensor& index,
                                const torch::stable::Tensor& offsets, int64_t layout, int64_t rows, int64_t columns) {
  using torch::headeronly::ScalarType;
  value_type(values);
  for (const auto* tensor : {&values, &index, &offsets}) {
    check_on_cpu(*tensor);
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->is_contiguous(), "values, index and offsets must be rows");
  }
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Byte && offsets.scalar_type() == ScalarType::Int,
                  "index must be uint8, offsets int32");
  STD_TORCH_CHECK(0 <= rows, "impossible shape");
  const int64_t groups = SparseShape{static_cast<SparseLayout>(layout), rows, columns, 0, 0}.groups();
  const int64_t blocks = groups > 0 ? (offsets.numel() - 1) / groups : 0;
  const SparseShape shape = checked_shape(layout, rows, columns, blocks);
  STD_TORCH_CHECK(offsets.numel() == shape.lists() + 1, "there must be an offset for each list, and one more");
  const int64_t entries = entries_of(values, shape);
  STD_TORCH_CHECK(
      entries >= 0 && values.numel() == shape.value_count(entries) && index.numel() == shape.index_bytes(entries),
      "values and index do not fit each other");
  return shape;
}

}  // namespace pyprune
