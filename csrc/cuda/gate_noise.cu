// noise[i] = (k + 1/2) / 2^23, where k is the upper 23 bits of word i % 4 of block i / 4; see philox.h.
//
// Each thread takes four numbers, one block. Moves per number: 4 bytes, written once.
#include "../philox.h"
#include "kernels/block_loop.cuh"
#include "upload.cuh"

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

Tensor gate_noise(const Tensor seed, const std::vector<int64_t> size, int64_t stream) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed must be one int64");
  const torch::stable::accelerator::DeviceGuard guard(seed.get_device_index());
  Tensor noise = torch::stable::new_empty(seed, size, ScalarType::Float);
  const int64_t blocks = blocks_for((noise.numel() + 4 * kThreads - 1) / (4 * kThreads));
  if (blocks > 0) {
    launch(&noise_kernel, blocks, kThreads, current_stream(seed), static_cast<const int64_t*>(seed.const_data_ptr()),
           static_cast<uint64_t>(stream), noise.numel(), static_cast<float*>(noise.mutable_data_ptr()));
  }
  return noise;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("gate_noise", TORCH_BOX(&pyprune::gate_noise));
}
