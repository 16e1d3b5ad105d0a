// out = weight * z, with one gate z per logit: gate_value() of gate_math.h, exactly +0 where z is zero.
//
// One gate per weight: each thread takes four neighbours, which are one block of noise and one 16-byte load of
// float32. Where the tensors do not all lie in C order, elements are taken one by one as the weight lies in memory,
// and each draws a block of noise for itself. Shared gates: z is computed once per gate into a buffer, then
// multiplied.
//
// Layout: any strides and alignments. Moves per weight: its own size twice, and that of a logit (12 bytes in
// float32); with shared gates, per gate, that of a logit, and 8 bytes of z (16 with float64 logits).
#pragma once

#include "gate_values.cuh"

namespace pyprune {
namespace {

template <class W>
constexpr int kGateQuads = sizeof(typename W::Bits) == 8 ? 1 : 2;  // what registers can hold
constexpr int kGateElements = 2;

template <class W, class L, class Kind>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    gate_kernel(Gate gate, Noise noise, int64_t numel, const typename W::Bits* weight, const typename L::Bits* logits,
                typename W::Bits* out) {
  struct Item {
    Pack<typename W::Bits, 4> weights;
    Pack<typename L::Bits, 4> logits;
  };
  const uint64_t key = noise.key();
  for_each_quad<kGateQuads<W>>(
      numel, quads_are_aligned(weight, logits, out),
      [&](auto width, int64_t quad) {
        return Item{load_quad(width, weight, quad, numel), load_quad(width, logits, quad, numel)};
      },
      [&](auto width, int64_t quad, const Item& item) {
        const PhiloxBlock block = Kind::kSampled ? philox(key, noise.stream, quad) : PhiloxBlock{};
        Pack<typename W::Bits, 4> result{};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto value = gate_value(Kind{}, gate, L::value(item.logits.get(i)), block.words[i]);
          result.set_in_zeros(i, gated<W>(item.weights.get(i), value.z));
        }
        store_quad(width, out, quad, numel, result);
      });
}

// The same for any strides. The nest walks weight, logits, out and the index in C order.
template <class W, class L>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    strided_gate_kernel(Gate gate, Noise noise, int64_t numel, const __grid_constant__ LoopNest<4> nest,
                        const typename W::Bits* weight, const typename L::Bits* logits, typename W::Bits* out) {
  struct Item {
    Places<4> places;
    typename W::Bits weight;
    typename L::Bits logit;
  };
  const uint64_t key = noise.key();
  for_each<kGateElements>(
      numel,
      [&](int64_t i) {
        const Places<4> places = places_of(nest, i);
        return Item{places, weight[places.offset[0]], logits[places.offset[1]]};
      },
      [&](int64_t, const Item& item) {
        const auto value = value_at(gate, key, noise.stream, item.places.offset[3], L::value(item.logit));
        out[item.places.offset[2]] = gated<W>(item.weight, value.z);
      });
}

// One gate per weight. The nest is that of strided_gate_kernel.
template <class W, class L>
void launch_gate(const Gate& gate, const Noise& noise, int64_t numel, const LoopNest<4>& nest,
                 const typename W::Bits* weight, const typename L::Bits* logits, typename W::Bits* out,
                 cudaStream_t stream) {
  if (!nest.all_linear()) {
    launch(&strided_gate_kernel<W, L>, blocks_for_steps(numel), kThreads, stream, gate, noise, numel, nest, weight,
           logits, out);
    return;
  }
  with_gate_kind(gate, [&](auto kind) {
    launch(&gate_kernel<W, L, decltype(kind)>, blocks_for_steps((numel + 3) / 4), kThreads, stream, gate, noise,
           numel, weight, logits, out);
  });
}

}  // namespace
}  // namespace pyprune
