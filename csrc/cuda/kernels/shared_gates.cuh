// Gates that several weights share: their values, computed once per gate, and the product with the weights.
#pragma once

#include "gate_values.cuh"

namespace pyprune {
namespace {

// z[i], and slope[i] if wanted, of gate i in C order: for gates that several weights share.
template <class L>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    values_kernel(Gate gate, Noise noise, int64_t gates, const __grid_constant__ LoopNest<1> nest,
                  const typename L::Bits* logits, typename L::Value* z, typename L::Value* slope) {
  const uint64_t key = noise.key();
  for_each<2>(
      gates, [&](int64_t i) { return logits[places_of(nest, i).offset[0]]; },
      [&](int64_t i, typename L::Bits logit) {
        const GateValue<typename L::Value> value = value_at(gate, key, noise.stream, i, L::value(logit));
        z[i] = value.z;
        if (slope != nullptr) slope[i] = value.slope;
      });
}

// out = z == 0 ? +0 : x * z with z[gate of the weight]. Quads: x and out lie linearly in one order.
template <class W, class Real, bool kQuads>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    multiply_kernel(int64_t numel, const __grid_constant__ LoopNest<3> nest, const typename W::Bits* x,
                    typename W::Bits* out, const Real* z) {
  constexpr int kX = 0, kOut = 1, kZ = 2;
  if constexpr (kQuads) {
    struct Item {
      Pack<typename W::Bits, 4> x;
      Real z[4];
    };
    const int inner = nest.loops - 1;
    const bool unbroken = nest.loops == 0 || nest.sizes[inner] % 4 == 0;  // no quad leaves the innermost loop
    const int64_t z_step = nest.loops == 0 ? 0 : nest.strides[kZ][inner];
    for_each_quad<2>(
        numel, quads_are_aligned(x, out),
        [&](auto width, int64_t quad) {
          Item item{load_quad(width, x, quad, numel), {}};
          if (unbroken) {
            const Real* const first = z + places_of(nest, 4 * quad).offset[kZ];
#pragma unroll
            for (int i = 0; i < 4; ++i) item.z[i] = first[i * z_step];
          } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (4 * quad + i < numel) item.z[i] = z[places_of(nest, 4 * quad + i).offset[kZ]];
            }
          }
          return item;
        },
        [&](auto width, int64_t quad, const Item& item) {
          Pack<typename W::Bits, 4> result{};
#pragma unroll
          for (int i = 0; i < 4; ++i) result.set_in_zeros(i, gated<W>(item.x.get(i), item.z[i]));
          store_quad(width, out, quad, numel, result);
        });
  } else {
    struct Item {
      typename W::Bits x;
      Real z;
    };
    for_each<4>(
        numel,
        [&](int64_t i) {
          const Places<3> places = places_of(nest, i);
          return Item{x[places.offset[kX]], z[places.offset[kZ]]};
        },
        [&](int64_t i, const Item& item) { out[places_of(nest, i).offset[kOut]] = gated<W>(item.x, item.z); });
  }
}

template <class L>
void launch_gate_values(const Gate& gate, const Noise& noise, int64_t gates, const LoopNest<1>& nest,
                        const typename L::Bits* logits, typename L::Value* z, typename L::Value* slope,
                        cudaStream_t stream) {
  launch(&values_kernel<L>, blocks_for_steps(gates), kThreads, stream, gate, noise, gates, nest, logits, z, slope);
}

template <class W, class Real>
void launch_multiply(int64_t numel, const LoopNest<3>& nest, const typename W::Bits* x, typename W::Bits* out,
                     const Real* z, cudaStream_t stream) {
  const bool quads = nest.linear(0) && nest.linear(1);
  const auto kernel = quads ? &multiply_kernel<W, Real, true> : &multiply_kernel<W, Real, false>;
  launch(kernel, blocks_for_steps(quads ? (numel + 3) / 4 : numel), kThreads, stream, numel, nest, x, out, z);
}

}  // namespace
}  // namespace pyprune
