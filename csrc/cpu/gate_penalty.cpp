// gate_penalty: how open the gates of each tensor are, and the gradient of that.
#include "kernels/gate_penalty.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "capability.h"
#include "denormals.h"
#include "parallel.h"
#include "tensors.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

Tensor gate_penalty(const std::vector<Tensor> logits, bool hard, double shift) {
  check_weights(logits);
  const std::vector<Strided> views = strided_of(logits);
  const std::vector<Chunk> chunks = chunks_of(views);
  std::vector<double> sums(chunks.size());
  const auto sum = PYPRUNE_KERNEL(penalty_sum);
  share_tasks(static_cast<int64_t>(chunks.size()), elements_of(views), [&](int64_t task, int64_t) {
    const KeepDenormals exact;
    const auto [tensor, start, count] = chunks[task];
    Room room;
    sums[task] = sum(views[tensor].dtype, views[tensor].in_a_row(start, count, room), hard, shift, count);
  });
  Tensor result = torch::stable::empty({static_cast<int64_t>(views.size())}, torch::headeronly::ScalarType::Double);
  double* const out = static_cast<double*>(result.mutable_data_ptr());
  std::fill_n(out, views.size(), 0.0);
  for (size_t i = 0; i < chunks.size(); ++i) {
    out[chunks[i].tensor] += sums[i];
  }
  return result;
}

std::vector<Tensor> gate_penalty_backward(const Tensor grad, const std::vector<Tensor> logits, double shift) {
  check_weights(logits);
  STD_TORCH_CHECK(grad.numel() == static_cast<int64_t>(logits.size()) && dtype_of(grad) == Dtype::kFloat64,
                  "expected one float64 gradient per tensor");
  std::vector<Tensor> results;
  for (const Tensor& one : logits) {
    results.push_back(torch::stable::empty_like(one));
  }
  std::vector<Strided> views = strided_of(logits), outs = strided_of(results);
  for (size_t i = 0; i < views.size(); ++i) {
    as_flat({&views[i], &outs[i]});
  }
  const Strided grads = strided_of(grad);
  const std::vector<Chunk> chunks = chunks_of(views);
  const auto slopes = PYPRUNE_KERNEL(penalty_slopes);
  share_tasks(static_cast<int64_t>(chunks.size()), elements_of(views), [&](int64_t task, int64_t) {
    const KeepDenormals exact;
    const auto [tensor, start, count] = chunks[task];
    const Strided& out = outs[tensor];
    Room room, out_room;
    char* const row = out.in_a_row(start, count, out_room);
    slopes(out.dtype, views[tensor].in_a_row(start, count, room), shift,
           *reinterpret_cast<const double*>(grads.at(tensor)), count, row);
    if (!out.contiguous()) {
      out.scatter(start, count, row);
    }
  });
  return results;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("gate_penalty", TORCH_BOX(&pyprune::gate_penalty));
  m.impl("gate_penalty_backward", TORCH_BOX(&pyprune::gate_penalty_backward));
}
