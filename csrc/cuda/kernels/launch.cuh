// Launches without torch: what the operators and the microbenchmarks call. A CUDA error becomes an exception.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tensor_table.cuh"

namespace pyprune {

inline void check_cuda(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(status));
}

// Launches on the stream; cudaLaunchKernelEx rather than <<<>>> because it converts and checks the arguments.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
            Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

// Of the current device.
inline int64_t multiprocessors() {
  int device = 0, count = 1;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// One wave of blocks that share all tiles.
inline int64_t blocks_for(int64_t tiles, int per_multiprocessor = kBlocksPerMultiprocessor) {
  return std::min<int64_t>(tiles, multiprocessors() * per_multiprocessor);
}

template <typename Item>
void fill_zero(Item* items, int64_t count, cudaStream_t stream) {
  if (count > 0) check_cuda(cudaMemsetAsync(items, 0, count * sizeof(Item), stream));  // a graph refuses size 0
}

template <typename Item>
struct Batch {
  static constexpr int kCapacity = (4096 - 64) / sizeof(Item);  // kernel parameters end at 4 KiB
  Item* destination;
  int32_t count;
  Item items[kCapacity];
};

template <typename Item>
__global__ void write_batch(const __grid_constant__ Batch<Item> batch) {
  for (int i = threadIdx.x; i < batch.count; i += blockDim.x) batch.destination[i] = batch.items[i];
}

// Sends items as kernel parameters, a batch per launch: nothing waits for the device, nothing is copied from pageable
// memory, and a CUDA graph replays it.
template <typename Item>
void upload(const std::vector<Item>& items, Item* destination, cudaStream_t stream) {
  for (size_t first = 0; first < items.size(); first += Batch<Item>::kCapacity) {
    Batch<Item> batch{};
    batch.destination = destination + first;
    batch.count = static_cast<int32_t>(std::min<size_t>(items.size() - first, Batch<Item>::kCapacity));
    std::copy_n(items.begin() + first, batch.count, batch.items);
    launch(&write_batch<Item>, 1, 128, stream, batch);
  }
}

}  // namespace pyprune
