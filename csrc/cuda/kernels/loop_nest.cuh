// Tensors of one shape walked together, whatever their strides: a nest of loops that travels as a kernel parameter.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensor_table.cuh"

namespace pyprune {

constexpr int kMaxLoops = 16;
__extension__ using Wide = unsigned __int128;

// Step `index` of the nest, the last loop fastest, lies at offset[t] of tensor t.
template <int kTensors>
struct LoopNest {
  int32_t loops;
  bool narrow;  // fewer than 2^31 steps: 32 bits do
  // n / size is (upper half of n * multiplier + n) >> shift (Granlund, Montgomery 1994).
  uint64_t multipliers[kMaxLoops];
  int32_t shifts[kMaxLoops];
  int64_t sizes[kMaxLoops];
  int64_t strides[kTensors][kMaxLoops];

  bool linear(int tensor) const {
    int64_t dense = 1;
    for (int l = loops - 1; l >= 0; --l) {
      if (strides[tensor][l] != dense) return false;
      dense *= sizes[l];
    }
    return true;
  }
  bool all_linear() const {
    for (int t = 0; t < kTensors; ++t) {
      if (!linear(t)) return false;
    }
    return true;
  }
};

template <int kTensors>
struct Places {
  int64_t offset[kTensors];
};

template <int kTensors, typename Index, typename Divide>
__device__ inline Places<kTensors> walk(const LoopNest<kTensors>& nest, Index index, const Divide& divide) {
  Places<kTensors> places{};
  const auto step = [&](int l, Index count) {
#pragma unroll
    for (int t = 0; t < kTensors; ++t) places.offset[t] += static_cast<int64_t>(count) * nest.strides[t][l];
  };
#pragma unroll 1
  for (int l = nest.loops - 1; l > 0; --l) {
    const Index quotient = divide(index, l);
    step(l, index - quotient * static_cast<Index>(nest.sizes[l]));
    index = quotient;
  }
  step(0, index);
  return places;
}

template <int kTensors>
__device__ inline Places<kTensors> places_of(const LoopNest<kTensors>& nest, int64_t index) {
  if (nest.narrow) {
    return walk(nest, static_cast<uint32_t>(index), [&](uint32_t n, int l) {
      return (__umulhi(n, static_cast<uint32_t>(nest.multipliers[l])) + n) >> nest.shifts[l];
    });
  }
  return walk(nest, static_cast<uint64_t>(index),
              [&](uint64_t n, int l) { return (__umul64hi(n, nest.multipliers[l]) + n) >> nest.shifts[l]; });
}

// The loops of a nest as the host collects them, outermost first.
template <int kTensors>
struct Loops {
  struct Loop {
    int64_t size;
    std::array<int64_t, kTensors> strides;
  };
  std::vector<Loop> loops;

  void add(int64_t size, const std::array<int64_t, kTensors>& strides) {
    if (size != 1) loops.push_back({size, strides});
  }

  // Loops that one stride can walk are joined. Order::kAny: as the first tensor lies in memory.
  LoopNest<kTensors> nest(Order order) const {
    std::vector<Loop> sorted = loops;
    if (order == Order::kAny) {
      std::stable_sort(sorted.begin(), sorted.end(),
                       [](const Loop& a, const Loop& b) { return a.strides[0] > b.strides[0]; });
    }
    std::vector<Loop> joined;
    int64_t steps = 1;
    for (const Loop& loop : sorted) {
      bool join = !joined.empty();
      for (int t = 0; join && t < kTensors; ++t) join = joined.back().strides[t] == loop.strides[t] * loop.size;
      if (join) {
        joined.back() = {joined.back().size * loop.size, loop.strides};
      } else {
        joined.push_back(loop);
      }
      steps *= loop.size;
    }
    LoopNest<kTensors> result{};
    if (steps == 0) return result;  // nothing to walk
    if (joined.size() > kMaxLoops) {
      throw std::runtime_error("tensors need " + std::to_string(joined.size()) + " loops that cannot be joined; " +
                               std::to_string(kMaxLoops) + " are supported: call .contiguous() on them first");
    }
    result.loops = static_cast<int32_t>(joined.size());
    result.narrow = steps < (int64_t{1} << 31);
    for (size_t l = 0; l < joined.size(); ++l) {
      const int64_t size = joined[l].size;
      result.sizes[l] = size;
      for (int t = 0; t < kTensors; ++t) result.strides[t][l] = joined[l].strides[t];
      while ((int64_t{1} << result.shifts[l]) < size) ++result.shifts[l];
      const int64_t missing = (int64_t{1} << result.shifts[l]) - size;
      const int bits = result.narrow ? 32 : 64;
      result.multipliers[l] = static_cast<uint64_t>((static_cast<Wide>(missing) << bits) / size + 1);
    }
    return result;
  }
};

}  // namespace pyprune
