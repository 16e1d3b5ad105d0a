// Times CUDA kernels between two events: median of several runs, as bytes per second beside a copy on the device.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "../cuda/kernels/launch.cuh"

namespace pyprune::bench {

class DeviceMemory {
 public:
  explicit DeviceMemory(int64_t bytes) { check_cuda(cudaMalloc(&data_, std::max<int64_t>(bytes, 1))); }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  template <typename Item>
  Item* as() const {
    return static_cast<Item*>(data_);
  }

 private:
  void* data_ = nullptr;
};

// The numbers behind a device pointer.
template <typename Item>
std::vector<Item> fetch(const Item* items, int64_t count) {
  std::vector<Item> copy(count);
  check_cuda(cudaMemcpy(copy.data(), items, count * sizeof(Item), cudaMemcpyDeviceToHost));
  return copy;
}

class Stopwatch {
 public:
  Stopwatch() {
    check_cuda(cudaEventCreate(&begin_));
    check_cuda(cudaEventCreate(&end_));
  }
  ~Stopwatch() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

  // Median milliseconds of a run. Short runs are timed in batches, so that launches queue up as they do in a program.
  template <typename Run>
  double median_ms(const Run& run) {
    run();
    const double first = time(1, run);
    const int batch = static_cast<int>(std::clamp(2.0 / std::max(first, 1e-3), 1.0, 50.0));
    const int samples = static_cast<int>(std::clamp(kMost / (first * batch), 3.0, 15.0));
    std::vector<double> ms(samples);
    std::generate(ms.begin(), ms.end(), [&] { return time(batch, run) / batch; });
    std::nth_element(ms.begin(), ms.begin() + samples / 2, ms.end());
    return ms[samples / 2];
  }

 private:
  static constexpr double kMost = 150;  // milliseconds for all samples, or three of them

  template <typename Run>
  double time(int batch, const Run& run) {
    check_cuda(cudaDeviceSynchronize());
    check_cuda(cudaEventRecord(begin_));
    for (int i = 0; i < batch; ++i) run();
    check_cuda(cudaEventRecord(end_));
    check_cuda(cudaEventSynchronize(end_));
    check_cuda(cudaGetLastError());
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, begin_, end_));
    return ms;
  }

  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

// One line per job: its time, its speed, and how many times longer it takes than copying the same number of bytes.
class Table {
 public:
  Table(const std::string& dtype, int64_t elements) : dtype_(dtype), elements_(elements) {
    std::printf("\n%-40s %-8s %12s %10s %9s %8s\n", "", "", "elements", "median ms", "GB/s", "x copy");
  }

  // `bytes` counts what the job must read and write, each once. The first job must be the copy.
  template <typename Run>
  void add(const std::string& job, double bytes, const Run& run) {
    const double ms = stopwatch_.median_ms(run), speed = bytes / ms / 1e6;
    if (copy_ == 0) copy_ = speed;
    std::printf("%-40s %-8s %12lld %10.4f %9.0f %8.2f\n", job.c_str(), dtype_.c_str(),
                static_cast<long long>(elements_), ms, speed, copy_ / speed);
    std::fflush(stdout);
  }

 private:
  std::string dtype_;
  int64_t elements_;
  Stopwatch stopwatch_;
  double copy_ = 0;
};

}  // namespace pyprune::bench
