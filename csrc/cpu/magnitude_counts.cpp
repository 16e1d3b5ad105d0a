// magnitude_counts: a histogram of the bits of |w|, from which `cut` finds where a threshold lies.
#include "kernels/magnitude_counts.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "capability.h"
#include "parallel.h"
#include "tensors.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

// Elements that one thread counts before it adds its counters up: so many that adding costs nothing beside them.
constexpr int64_t kPiece = int64_t{64} * kChunk;

Tensor magnitude_counts(const Tensor weight, int64_t low, int64_t shift, int64_t bins) {
  check_weights({weight});
  std::vector<Strided> views = strided_of(std::vector<Tensor>{weight});
  Strided& view = views[0];
  as_flat({&view});
  const int bits = static_cast<int>(8 * item_size(view.dtype)) - 1;
  STD_TORCH_CHECK(low >= 0 && shift >= 0 && shift < bits && bins > 0 &&
                      static_cast<uint64_t>(bins) <= (uint64_t{1} << (bits - shift)),
                  "no such intervals: ", bins, " of 2^", shift, " from ", low);
  const Intervals intervals{static_cast<uint64_t>(low), static_cast<int>(shift), static_cast<uint64_t>(bins)};
  const int64_t pieces = (view.numel + kPiece - 1) / kPiece;
  std::vector<std::vector<int64_t>> sums(thread_count());
  std::vector<std::vector<uint32_t>> tables(thread_count());
  const auto run = PYPRUNE_KERNEL(magnitude_counts_run);
  share_tasks(pieces, view.numel, [&](int64_t piece, int64_t worker) {
    sums[worker].resize(bins + 1);
    tables[worker].assign(2 * bins, 0);
    Room room;
    const int64_t end = std::min(view.numel, (piece + 1) * kPiece);
    for (int64_t start = piece * kPiece; start < end; start += kChunk) {
      const int64_t count = std::min(kChunk, end - start);
      const void* elements = view.in_a_row(start, count, room);
      sums[worker][bins] += run(elements, view.dtype, count, intervals, tables[worker].data());
    }
    for (int64_t bin = 0; bin < bins; ++bin) {
      sums[worker][bin] += int64_t{tables[worker][bin]} + tables[worker][bins + bin];
    }
  });
  Tensor result = torch::stable::empty({bins + 1}, torch::headeronly::ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(result.mutable_data_ptr());
  std::fill(out, out + bins + 1, 0);
  for (const std::vector<int64_t>& sum : sums) {
    for (size_t bin = 0; bin < sum.size(); ++bin) {
      out[bin] += sum[bin];
    }
  }
  return result;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("magnitude_counts", TORCH_BOX(&pyprune::magnitude_counts));
}
