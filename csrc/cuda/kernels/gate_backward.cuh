// The gradients of gate where each weight has its own, with the noise drawn again:
//   grad_weight = grad * z, exactly +0 where z is zero
//   grad_logits = grad * weight * dz / dlogit, in float32 (float64 for float64 weights); 0 where dz / dlogit is 0
// As the forward pass walks.
//
// Layout: any strides and alignments. Moves per weight: its own size three times, and that of a logit twice (20 bytes
// in float32).
#pragma once

#include "gate_values.cuh"

namespace pyprune {
namespace {

// What registers can hold.
template <class W>
constexpr int kGradientQuads = sizeof(typename W::Bits) == 8 ? 1 : 2;
constexpr int kGradientElements = 2;

template <class W, class L>
struct Gradients {
  const typename W::Bits* grad;
  const typename W::Bits* weight;
  typename W::Bits* grad_weight;  // null if not wanted
  typename L::Bits* grad_logits;
};

template <class W, class L>
__device__ inline typename L::Bits logit_gradient(typename W::Bits grad, typename W::Bits weight,
                                                  typename L::Value slope) {
  using Value = typename W::Value;
  const Value product = W::value(grad) * W::value(weight) * static_cast<Value>(slope);
  return slope == 0 ? typename L::Bits{0} : L::bits(static_cast<typename L::Value>(product));
}

template <class W, class L, class Kind>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    gate_backward_kernel(Gate gate, Noise noise, int64_t numel, Gradients<W, L> tensors,
                         const typename L::Bits* logits) {
  struct Item {
    Pack<typename W::Bits, 4> grads;
    Pack<typename W::Bits, 4> weights;
    Pack<typename L::Bits, 4> logits;
  };
  const uint64_t key = noise.key();
  const bool for_weight = tensors.grad_weight != nullptr, for_logits = tensors.grad_logits != nullptr;
  for_each_quad<kGradientQuads<W>>(
      numel, quads_are_aligned(tensors.grad, tensors.weight, tensors.grad_weight, tensors.grad_logits, logits),
      [&](auto width, int64_t quad) {
        Item item{load_quad(width, tensors.grad, quad, numel), {}, load_quad(width, logits, quad, numel)};
        if (for_logits) item.weights = load_quad(width, tensors.weight, quad, numel);
        return item;
      },
      [&](auto width, int64_t quad, const Item& item) {
        const PhiloxBlock block = Kind::kSampled ? philox(key, noise.stream, quad) : PhiloxBlock{};
        Pack<typename W::Bits, 4> grad_weights{};
        Pack<typename L::Bits, 4> grad_logits{};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto value = gate_value(Kind{}, gate, L::value(item.logits.get(i)), block.words[i]);
          grad_weights.set_in_zeros(i, gated<W>(item.grads.get(i), value.z));
          grad_logits.set_in_zeros(i, logit_gradient<W, L>(item.grads.get(i), item.weights.get(i), value.slope));
        }
        if (for_weight) store_quad(width, tensors.grad_weight, quad, numel, grad_weights);
        if (for_logits) store_quad(width, tensors.grad_logits, quad, numel, grad_logits);
      });
}

// The same for any strides. The nest walks weight, grad, logits, the two gradients and the index in C order.
template <class W, class L>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    strided_gate_backward_kernel(Gate gate, Noise noise, int64_t numel, const __grid_constant__ LoopNest<6> nest,
                                 Gradients<W, L> tensors, const typename L::Bits* logits) {
  struct Item {
    typename W::Bits grad;
    typename W::Bits weight;
    typename L::Bits logit;
  };
  const uint64_t key = noise.key();
  const bool for_weight = tensors.grad_weight != nullptr, for_logits = tensors.grad_logits != nullptr;
  for_each<kGradientElements>(
      numel,
      [&](int64_t i) {
        const Places<6> places = places_of(nest, i);
        return Item{tensors.grad[places.offset[1]],
                    for_logits ? tensors.weight[places.offset[0]] : typename W::Bits{0}, logits[places.offset[2]]};
      },
      [&](int64_t i, const Item& item) {
        const Places<6> places = places_of(nest, i);
        const auto value = value_at(gate, key, noise.stream, places.offset[5], L::value(item.logit));
        if (for_weight) tensors.grad_weight[places.offset[3]] = gated<W>(item.grad, value.z);
        if (for_logits) {
          tensors.grad_logits[places.offset[4]] = logit_gradient<W, L>(item.grad, item.weight, value.slope);
        }
      });
}

// The nest is that of strided_gate_backward_kernel.
template <class W, class L>
void launch_gate_backward(const Gate& gate, const Noise& noise, int64_t numel, const LoopNest<6>& nest,
                          const Gradients<W, L>& tensors, const typename L::Bits* logits, cudaStream_t stream) {
  if (!nest.all_linear()) {
    launch(&strided_gate_backward_kernel<W, L>, blocks_for_steps(numel), kThreads, stream, gate, noise, numel, nest,
           tensors, logits);
    return;
  }
  with_gate_kind(gate, [&](auto kind) {
    launch(&gate_backward_kernel<W, L, decltype(kind)>, blocks_for_steps((numel + 3) / 4), kThreads, stream, gate,
           noise, numel, tensors, logits);
  });
}

}  // namespace
}  // namespace pyprune
