// probe: whether something that masks drop is not zero. A look at a few elements of each weight is cheaper than
// reading it by far (a cache miss or two per look), and enough to see that something wrote to the weight as a whole.
#include "kernels/probe.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstring>

#include "capability.h"
#include "parallel.h"
#include "tensors.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

constexpr int64_t kLooks = 128;

// Whether a look finds something, others at each turn, so that all are looked at in the end; in small weights all
// are.
bool look(const Strided& weight, const Strided& mask, int64_t turn) {
  const int64_t size = item_size(weight.dtype), step = std::max<int64_t>(1, weight.numel / kLooks);
  for (int64_t at = step == 1 ? 0 : turn * 7919 % step; at < weight.numel; at += step) {
    uint64_t bits = 0;
    std::memcpy(&bits, weight.data + at * size, size);
    if (mask.data[at] == 0 && bits != 0) {
      return true;
    }
  }
  return false;
}

// For each weight 1 if something was found, else 0. Of a negative turn all is read; else a weight that does not lie
// in memory like its mask counts as found.
Tensor probe(const std::vector<Tensor> weights, const std::vector<Tensor> masks, int64_t turn) {
  check_weights(weights);
  check_masks(masks, weights);
  std::vector<Strided> w = strided_of(weights), m = strided_of(masks);
  std::vector<std::atomic<int64_t>> found(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool alike = as_flat({&w[i], &m[i]});
    if (turn >= 0) {
      found[i] = !alike || look(w[i], m[i], turn);
    }
  }
  if (turn < 0) {
    const std::vector<Chunk> chunks = chunks_of(w);
    const auto run = PYPRUNE_KERNEL(has_stray);
    share_tasks(static_cast<int64_t>(chunks.size()), elements_of(w), [&](int64_t task, int64_t) {
      const auto [tensor, start, count] = chunks[task];
      Room weight_room, mask_room;
      const char* const row = w[tensor].in_a_row(start, count, weight_room);
      const char* const kept = m[tensor].in_a_row(start, count, mask_room);
      if (run(row, reinterpret_cast<const uint8_t*>(kept), w[tensor].dtype, count)) {
        found[tensor] = 1;
      }
    });
  }
  Tensor result = torch::stable::empty({static_cast<int64_t>(weights.size())}, torch::headeronly::ScalarType::Long);
  std::copy(found.begin(), found.end(), static_cast<int64_t*>(result.mutable_data_ptr()));
  return result;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("probe", TORCH_BOX(&pyprune::probe));
}
