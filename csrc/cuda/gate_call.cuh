// What forward and backward of gates share: the call as torch hands it over.
#pragma once

#include <array>
#include <optional>

#include "../gate_blocks.h"
#include "kernels/gate_values.cuh"
#include "kernels/shared_gates.cuh"
#include "upload.cuh"

// Hidden, as torch's stable types are.
HIDDEN_NAMESPACE_BEGIN(pyprune)
namespace {

// A weight, its logits and how they gate it.
class GateCall {
 public:
  GateCall(const Tensor& weight_, const Tensor& logits_, const std::optional<Tensor>& seed, int64_t stream_number,
           int64_t rule, double beta, double gamma, double zeta)
      : weight(weight_),
        logits(logits_),
        gate{static_cast<GateRule>(rule), seed.has_value(), beta, gamma, zeta},
        noise{nullptr, static_cast<uint64_t>(stream_number)},
        one_per_weight(weight_.numel() == logits_.numel()),
        stream(nullptr) {
    check_weights({weight, logits});
    on_device(logits);
    const Dtype dtype = dtype_of(logits);
    STD_TORCH_CHECK(dtype == Dtype::kFloat32 || dtype == dtype_of(weight),
                    "logits must be float32 or like the weight");
    const bool fits = GateBlocks::fit(weight.sizes().data(), weight.dim(), logits.sizes().data(), logits.dim());
    STD_TORCH_CHECK(fits, "each size of the logits must divide the weight's");
    if (seed.has_value()) {
      on_device(*seed);
      check_seed(*seed);
      noise.seed = static_cast<const int64_t*>(seed->const_data_ptr());
    }
    stream = current_stream(weight);
  }

  // That this can be read or written in place of `model`.
  void check_like(const Tensor& tensor, const Tensor& model) const {
    on_device(tensor);
    STD_TORCH_CHECK(tensor.scalar_type() == model.scalar_type() && tensor.sizes().vec() == model.sizes().vec(),
                    "gradients and outputs must have the dtype and shape of what they belong to");
  }

  // Calls use(W{}, L{}) with the types of weight and logits.
  template <class Use>
  void with_types(const Use& use) const {
    const bool float32_logits = dtype_of(logits) == Dtype::kFloat32;
    switch (dtype_of(weight)) {
      case Dtype::kFloat64: return float32_logits ? use(Float64{}, Float32{}) : use(Float64{}, Float64{});
      case Dtype::kFloat16: return float32_logits ? use(Float16{}, Float32{}) : use(Float16{}, Float16{});
      case Dtype::kBFloat16: return float32_logits ? use(BFloat16{}, Float32{}) : use(BFloat16{}, BFloat16{});
      default: return use(Float32{}, Float32{});
    }
  }

  // One loop per dimension, over tensors of the weight's shape; the last is no tensor but the index in C order.
  template <size_t kTensors>
  LoopNest<kTensors + 1> element_nest(const std::array<const Tensor*, kTensors>& tensors) const {
    Loops<kTensors + 1> loops;
    int64_t index = weight.numel();
    for (int64_t d = 0; d < weight.dim(); ++d) {
      index /= std::max<int64_t>(1, weight.size(d));
      std::array<int64_t, kTensors + 1> strides{};
      for (size_t t = 0; t < kTensors; ++t) strides[t] = tensors[t]->stride(d);
      strides[kTensors] = index;
      loops.add(weight.size(d), strides);
    }
    return loops.nest(Order::kAny);
  }

  // z, and slope if wanted, of all gates in C order, where they are shared.
  template <class L>
  void compute_values(L, typename L::Value* z, typename L::Value* slope) const {
    Loops<1> loops;
    for (int64_t d = 0; d < logits.dim(); ++d) loops.add(logits.size(d), {logits.stride(d)});
    launch_gate_values<L>(gate, noise, logits.numel(), loops.nest(Order::kLogical),
                          static_cast<const typename L::Bits*>(logits.const_data_ptr()), z, slope, stream);
  }

  // out = x * z for tensors of the weight's shape and dtype and the values of shared gates.
  template <class W, class Real>
  void multiply(W, const Tensor& x, const Real* z, Tensor& out) const {
    if (weight.numel() == 0) return;
    Loops<3> loops;
    int64_t gates_left = logits.numel();
    for (int64_t d = 0; d < weight.dim(); ++d) {
      const int64_t gates = logits.size(d), run = weight.size(d) / gates;
      gates_left /= gates;
      loops.add(gates, {x.stride(d) * run, out.stride(d) * run, gates_left});
      loops.add(run, {x.stride(d), out.stride(d), 0});
    }
    launch_multiply<W>(weight.numel(), loops.nest(Order::kAny),
                       static_cast<const typename W::Bits*>(x.const_data_ptr()),
                       static_cast<typename W::Bits*>(out.mutable_data_ptr()), z, stream);
  }

  const Tensor& weight;
  const Tensor& logits;
  Gate gate;
  Noise noise;
  bool one_per_weight;
  cudaStream_t stream;

 private:
  // A pointer of another device would take the whole process's CUDA context down.
  void on_device(const Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == weight.get_device_index(),
                    "all tensors must be on one CUDA device");
  }
};

}  // namespace
HIDDEN_NAMESPACE_END(pyprune)
