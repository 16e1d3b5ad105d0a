// noise[i] = (k + 1/2) / 2^23, where k is the upper 23 bits of word i % 4 of block i / 4; see philox.h.
//
// Each thread takes four numbers, one block. Moves per number: 4 bytes, written once.
#pragma once

#include "../../philox.h"
#include "block_loop.cuh"
#include "launch.cuh"

namespace pyprune {
namespace {

__global__ void __launch_bounds__(kThreads)
    noise_kernel(const int64_t* seed, uint64_t stream, int64_t numel, float* noise) {
  const uint64_t key = static_cast<uint64_t>(*seed);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t quad = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; 4 * quad < numel;
       quad += threads) {
    const PhiloxBlock block = philox(key, stream, static_cast<uint64_t>(quad));
    float4 numbers{uniform<float>(block.words[0]), uniform<float>(block.words[1]), uniform<float>(block.words[2]),
                   uniform<float>(block.words[3])};
    if (4 * quad + 4 <= numel) {
      reinterpret_cast<float4*>(noise)[quad] = numbers;  // new memory is aligned
    } else {
      const float* const first = &numbers.x;
      for (int64_t i = 0; 4 * quad + i < numel; ++i) noise[4 * quad + i] = first[i];
    }
  }
}

inline void launch_gate_noise(const int64_t* seed, uint64_t stream_number, int64_t numel, float* noise,
                              cudaStream_t stream) {
  const int64_t blocks = blocks_for((numel + 4 * kThreads - 1) / (4 * kThreads));
  if (blocks > 0) launch(&noise_kernel, blocks, kThreads, stream, seed, stream_number, numel, noise);
}

}  // namespace
}  // namespace pyprune
