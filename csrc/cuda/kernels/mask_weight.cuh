// out[i] = mask[i] ? weight[i] : +0, on the bits.
//
// Each thread takes four neighbours; where the tensors do not lie alike in memory, elements one by one as the weight
// lies. Layout: any strides and alignments. Moves per element: 1 byte of mask and twice the weight's size.
#pragma once

#include "gate_values.cuh"

namespace pyprune {
namespace {

constexpr int kMaskedQuads = 4;
constexpr int kMaskedElements = 2;  // each may hold the registers of a division

template <class Bits>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    mask_weight_kernel(int64_t numel, const Bits* weight, const uint8_t* mask, Bits* out) {
  struct Item {
    Pack<Bits, 4> weights;
    Pack<uint8_t, 4> keep;
  };
  for_each_quad<kMaskedQuads>(
      numel, quads_are_aligned(weight, mask, out),
      [&](auto width, int64_t quad) {
        return Item{load_quad(width, weight, quad, numel), load_quad(width, mask, quad, numel)};
      },
      [&](auto width, int64_t quad, const Item& item) {
        Pack<Bits, 4> result = item.weights;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (item.keep.get(i) == 0) result.clear(i);
        }
        store_quad(width, out, quad, numel, result);
      });
}

// The same for any strides. The nest walks weight, mask and out.
template <class Bits>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    strided_mask_weight_kernel(int64_t numel, const __grid_constant__ LoopNest<3> nest, const Bits* weight,
                               const uint8_t* mask, Bits* out) {
  struct Item {
    int64_t place;
    Bits weight;
    uint8_t keep;
  };
  for_each<kMaskedElements>(
      numel,
      [&](int64_t i) {
        const Places<3> places = places_of(nest, i);
        return Item{places.offset[2], weight[places.offset[0]], mask[places.offset[1]]};
      },
      [&](int64_t, const Item& item) { out[item.place] = item.keep != 0 ? item.weight : Bits{0}; });
}

template <class Bits>
void launch_mask_weight(int64_t numel, const LoopNest<3>& nest, const Bits* weight, const uint8_t* mask, Bits* out,
                        cudaStream_t stream) {
  if (nest.all_linear()) {
    launch(&mask_weight_kernel<Bits>, blocks_for_steps((numel + 3) / 4), kThreads, stream, numel, weight, mask, out);
  } else {
    launch(&strided_mask_weight_kernel<Bits>, blocks_for_steps(numel), kThreads, stream, numel, nest, weight, mask,
           out);
  }
}

}  // namespace
}  // namespace pyprune
