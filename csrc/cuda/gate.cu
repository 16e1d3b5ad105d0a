#include "gate_call.cuh"
#include "kernels/gate.cuh"

namespace pyprune {
namespace {

void gate_out(const Tensor weight, const Tensor logits, const std::optional<Tensor> seed, int64_t stream,
              int64_t rule, double beta, double gamma, double zeta, Tensor out) {
  const GateCall call(weight, logits, seed, stream, rule, beta, gamma, zeta);
  call.check_like(out, weight);
  if (weight.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  call.with_types([&]<class W, class L>(W, L) {
    if (call.one_per_weight) {
      launch_gate<W, L>(call.gate, call.noise, weight.numel(), call.element_nest<3>({&weight, &logits, &out}),
                        static_cast<const typename W::Bits*>(weight.const_data_ptr()),
                        static_cast<const typename L::Bits*>(logits.const_data_ptr()),
                        static_cast<typename W::Bits*>(out.mutable_data_ptr()), call.stream);
    } else {
      const DeviceArray<typename L::Value> z(logits, logits.numel());
      call.compute_values(L{}, z.data, nullptr);
      call.multiply(W{}, weight, z.data, out);
    }
  });
}

Tensor gate(const Tensor weight, const Tensor logits, const std::optional<Tensor> seed, int64_t stream, int64_t rule,
            double beta, double gamma, double zeta) {
  Tensor out = torch::stable::empty_like(weight);
  gate_out(weight, logits, seed, stream, rule, beta, gamma, zeta, out);
  return out;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("gate", TORCH_BOX(&pyprune::gate));
  m.impl("gate_out", TORCH_BOX(&pyprune::gate_out));
}
