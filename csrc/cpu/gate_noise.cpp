// gate_noise: the uniform numbers of the gates, for references.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "capability.h"
#include "kernels/gate.h"
#include "parallel.h"
#include "tensors.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

Tensor gate_noise(const Tensor seed, const std::vector<int64_t> size, int64_t stream) {
  check_seed(seed);
  check_on_cpu(seed);
  const Noise noise{*static_cast<const uint64_t*>(seed.const_data_ptr()), static_cast<uint64_t>(stream)};
  Tensor result = torch::stable::empty(size, torch::headeronly::ScalarType::Float);
  float* const out = static_cast<float*>(result.mutable_data_ptr());
  const int64_t numel = result.numel();
  const auto draw = PYPRUNE_KERNEL(draw_words);
  share_tasks((numel + kChunk - 1) / kChunk, numel, [&](int64_t task, int64_t) {
    uint32_t words[kGateBlock];
    for (int64_t start = task * kChunk; start < std::min(numel, (task + 1) * kChunk); start += kGateBlock) {
      const int64_t count = std::min(kGateBlock, numel - start);
      draw(noise, start, count, words);
      std::transform(words, words + count, out + start, uniform<float>);
    }
  });
  return result;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("gate_noise", TORCH_BOX(&pyprune::gate_noise));
}
