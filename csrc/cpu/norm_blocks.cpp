#include "norm_blocks.h"

#include <algorithm>

#include "capability.h"
#include "kernels/norms.h"

namespace pyprune {
namespace {

int64_t blocks_in(int64_t count) {
  return (count + kNormBlock - 1) / kNormBlock;
}

}  // namespace

static_assert(kChunk % kNormBlock == 0, "a chunk holds whole blocks");

NormBlocks::NormBlocks(const std::vector<Strided>& weights) {
  for (const Strided& weight : weights) {
    dtypes_.push_back(weight.dtype);
    sums_.emplace_back(blocks_in(weight.numel));
  }
}

void NormBlocks::add(const Chunk& run, const void* data, double factor) {
  PYPRUNE_KERNEL(sum_squares)(data, dtypes_[run.tensor], run.count, factor, room(run));
}

double NormBlocks::of_run(const Chunk& run) const {
  double sum = 0;
  for (int64_t i = 0; i < run.count; i += kNormBlock) {
    sum += sums_[run.tensor][(run.start + i) / kNormBlock];
  }
  return sum;
}

// The block sums are a vector again: summed by the same rule until one number is left.
double NormBlocks::of_weight(size_t tensor) const {
  std::vector<double> sums = sums_[tensor];
  do {
    std::vector<double> next;
    for (size_t start = 0; start < sums.size(); start += kNormBlock) {
      next.push_back(
          PYPRUNE_KERNEL(sum_block)(sums.data() + start, std::min<int64_t>(kNormBlock, sums.size() - start)));
    }
    sums = std::move(next);
  } while (sums.size() > 1);
  return sums.empty() ? 0.0 : sums[0];
}

}  // namespace pyprune
