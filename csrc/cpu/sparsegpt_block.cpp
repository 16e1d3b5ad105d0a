// sparsegpt_block: the factor is packed once, then the rows are shared by the threads.
#include "kernels/sparsegpt_block.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../sparsegpt_check.h"
#include "capability.h"
#include "denormals.h"
#include "parallel.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

constexpr int64_t kRowsOfTask = 64;  // a multiple of the rows that every capability takes at a time

struct alignas(64) Line {
  char bytes[64];
};

std::vector<Line> lines(int64_t bytes) {
  return std::vector<Line>((bytes + sizeof(Line) - 1) / sizeof(Line));
}

void sparsegpt_block(const Tensor weight, const Tensor sums, const Tensor factor, const Tensor mask, int64_t keep,
                     int64_t of) {
  const KeepDenormals exact;
  check_sparsegpt_block(weight, sums, factor, mask, keep, of);
  for (const Tensor* tensor : {&weight, &sums, &factor, &mask}) {
    check_on_cpu(*tensor);
  }
  const int64_t rows = weight.size(0), columns = weight.size(1);
  if (rows == 0 || columns == 0) {
    return;
  }
  const Dtype dtype = dtype_of(weight);
  std::vector<Line> packed = lines(packed_count(columns) * item_size(dtype));
  PYPRUNE_KERNEL(pack_factor)(factor.const_data_ptr(), factor.stride(0), dtype, columns, of, packed.data());
  std::vector<std::vector<Line>> rooms(thread_count());
  const auto at = [](const Tensor& tensor, int64_t row, Dtype type) {
    return static_cast<char*>(tensor.mutable_data_ptr()) + row * tensor.stride(0) * item_size(type);
  };
  const int64_t work = rows * columns * (1 + columns / 16);  // an element of other kernels takes as long as 16 sums
  share_tasks((rows + kRowsOfTask - 1) / kRowsOfTask, work, [&](int64_t task, int64_t worker) {
    if (rooms[worker].empty()) {
      rooms[worker] = lines(sparsegpt_room(columns));
    }
    const int64_t row = task * kRowsOfTask;
    const SparseGptRows block{dtype,
                              at(weight, row, dtype),
                              at(sums, row, dtype),
                              reinterpret_cast<uint8_t*>(at(mask, row, Dtype::kBool)),
                              weight.stride(0),
                              sums.stride(0),
                              mask.stride(0),
                              std::min(kRowsOfTask, rows - row),
                              columns,
                              keep,
                              of};
    PYPRUNE_KERNEL(sparsegpt_rows)(block, packed.data(), rooms[worker].data());
  });
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("sparsegpt_block", TORCH_BOX(&pyprune::sparsegpt_block));
}
