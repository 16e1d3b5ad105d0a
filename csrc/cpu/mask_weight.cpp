// mask_weight: where(mask, weight, 0) into new memory, chunk by chunk, with the kernel of fold.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "capability.h"
#include "huge_pages.h"
#include "kernels/fold.h"
#include "parallel.h"
#include "tensors.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

Tensor mask_weight(const Tensor weight, const Tensor mask) {
  check_weights({weight});
  check_masks({mask}, {weight});
  Tensor out = torch::stable::empty_like(weight);
  prefer_huge_pages(out.mutable_data_ptr(), out.numel() * item_size(dtype_of(out)));
  Strided w = strided_of(weight), m = strided_of(mask), o = strided_of(out);
  as_flat({&w, &m, &o});
  const auto run = PYPRUNE_KERNEL(fold_run);
  share_tasks((w.numel + kChunk - 1) / kChunk, w.numel, [&](int64_t task, int64_t) {
    Room weight_room, mask_room, out_room;
    const int64_t start = task * kChunk, count = std::min(kChunk, w.numel - start);
    char* const row = o.to_write(start, count, out_room);
    run(w.in_a_row(start, count, weight_room), reinterpret_cast<const uint8_t*>(m.in_a_row(start, count, mask_room)),
        row, w.dtype, count);
    if (!o.contiguous()) {
      o.scatter(start, count, row);
    }
  });
  return out;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("mask_weight", TORCH_BOX(&pyprune::mask_weight));
}
