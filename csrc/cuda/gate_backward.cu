#include "gate_call.cuh"
#include "kernels/gate_backward.cuh"
#include "kernels/shared_gate_backward.cuh"

namespace pyprune {
namespace {

template <class W, class L>
void launch_one_per_weight(const GateCall& call, const Tensor& grad, const Gradients<W, L>& tensors,
                           const Tensor& grad_weight, const Tensor& grad_logits) {
  const auto* const logits = static_cast<const typename L::Bits*>(call.logits.const_data_ptr());
  const LoopNest<6> nest = call.element_nest<5>({&call.weight, &grad, &call.logits,
                                                 tensors.grad_weight == nullptr ? &call.weight : &grad_weight,
                                                 tensors.grad_logits == nullptr ? &call.logits : &grad_logits});
  launch_gate_backward(call.gate, call.noise, call.weight.numel(), nest, tensors, logits, call.stream);
}

template <class W, class L>
void launch_shared(const GateCall& call, const Tensor& grad, const Gradients<W, L>& tensors, Tensor& grad_weight,
                   const Tensor& grad_logits) {
  using Value = typename L::Value;
  const Tensor &weight = call.weight, &logits = call.logits;
  const bool for_weight = tensors.grad_weight != nullptr, for_logits = tensors.grad_logits != nullptr;
  const int64_t gates = logits.numel();
  const DeviceArray<Value> z(logits, gates);
  if (!for_logits) {
    call.compute_values(L{}, z.data, nullptr);
    call.multiply(W{}, grad, z.data, grad_weight);
    return;
  }
  const DeviceArray<Value> slope(logits, gates);
  call.compute_values(L{}, z.data, slope.data);

  const Tensor& weight_like = for_weight ? grad_weight : weight;
  Loops<4> gate_loops;
  Loops<3> weight_loops;
  for (int64_t d = 0; d < weight.dim(); ++d) {
    const int64_t run = weight.size(d) / logits.size(d);
    const int64_t a = weight.stride(d), b = grad.stride(d), c = weight_like.stride(d);
    gate_loops.add(logits.size(d), {a * run, b * run, c * run, grad_logits.stride(d)});
    weight_loops.add(run, {a, b, c});
  }
  const LoopNest<3> weight_nest = weight_loops.nest(Order::kLogical);
  const int64_t run = GateBlocks(weight.sizes().data(), logits.sizes().data(), weight.dim()).run;
  const SharedSums plan(gates, weight.numel(), run, weight_nest);
  const DeviceArray<double> sums(logits, 2 * plan.room);
  launch_shared_gate_backward(plan, gate_loops.nest(Order::kLogical), weight_nest, tensors, z.data, slope.data,
                              sums.data, call.stream);
}

// A gradient that is not wanted has no elements.
void gate_backward_out(const Tensor grad, const Tensor weight, const Tensor logits, const std::optional<Tensor> seed,
                       int64_t stream, int64_t rule, double beta, double gamma, double zeta, Tensor grad_weight,
                       Tensor grad_logits) {
  const GateCall call(weight, logits, seed, stream, rule, beta, gamma, zeta);
  call.check_like(grad, weight);
  const bool for_weight = grad_weight.numel() > 0, for_logits = grad_logits.numel() > 0;
  if (for_weight) call.check_like(grad_weight, weight);
  if (for_logits) call.check_like(grad_logits, logits);
  if (!for_weight && !for_logits) return;
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  if (weight.numel() == 0) {
    torch::stable::zero_(grad_logits);  // sums of nothing
    return;
  }
  call.with_types([&]<class W, class L>(W, L) {
    using Bits = typename W::Bits;
    const Gradients<W, L> tensors{
        static_cast<const Bits*>(grad.const_data_ptr()), static_cast<const Bits*>(weight.const_data_ptr()),
        for_weight ? static_cast<Bits*>(grad_weight.mutable_data_ptr()) : nullptr,
        for_logits ? static_cast<typename L::Bits*>(grad_logits.mutable_data_ptr()) : nullptr};
    if (call.one_per_weight) {
      launch_one_per_weight(call, grad, tensors, grad_weight, grad_logits);
    } else {
      launch_shared(call, grad, tensors, grad_weight, grad_logits);
    }
  });
}

std::tuple<Tensor, Tensor> gate_backward(const Tensor grad, const Tensor weight, const Tensor logits,
                                         const std::optional<Tensor> seed, int64_t stream, int64_t rule, double beta,
                                         double gamma, double zeta, bool for_weight, bool for_logits) {
  const auto like = [](const Tensor& tensor, bool wanted) {
    return wanted ? torch::stable::empty_like(tensor) : torch::stable::new_empty(tensor, {0});
  };
  Tensor grad_weight = like(weight, for_weight), grad_logits = like(logits, for_logits);
  gate_backward_out(grad, weight, logits, seed, stream, rule, beta, gamma, zeta, grad_weight, grad_logits);
  return {grad_weight, grad_logits};
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("gate_backward", TORCH_BOX(&pyprune::gate_backward));
  m.impl("gate_backward_out", TORCH_BOX(&pyprune::gate_backward_out));
}
