// Registers a kernel once per CPU capability and size, from the first-level cache to memory, as bytes per second.
#pragma once

#include <benchmark/benchmark.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "../cpu/capability.h"

namespace pyprune::bench {

// Elements: 16 KiB to 256 MiB of float32.
constexpr int64_t kSmallest = int64_t{1} << 12, kLargest = int64_t{1} << 26;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Array = std::unique_ptr<T[], Free>;

// Memory aligned as torch aligns it, every page touched.
template <class T>
Array<T> array(int64_t count, T value) {
  T* const data = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
  std::fill_n(data, count, value);
  return Array<T>(data);
}

// `make(count)` prepares data and returns what is timed; it moves `bytes` per element, each read or written once.
template <class Make>
void add(const std::string& name, int64_t bytes, const Make& make) {
  for (const std::string& capability : available_capabilities()) {
    benchmark::RegisterBenchmark((name + "/" + capability).c_str(),
                                 [=](benchmark::State& state) {
                                   set_capability(capability);
                                   const int64_t count = state.range(0);
                                   auto run = make(count);
                                   for (auto _ : state) {
                                     run();
                                     benchmark::ClobberMemory();
                                   }
                                   state.SetBytesProcessed(state.iterations() * count * bytes);
                                   state.counters["ns/element"] =
                                       benchmark::Counter(static_cast<double>(state.iterations() * count) / 1e9,
                                                          benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
                                   set_capability("auto");
                                 })
        ->RangeMultiplier(16)
        ->Range(kSmallest, kLargest)
        ->UseRealTime();
  }
}

}  // namespace pyprune::bench
