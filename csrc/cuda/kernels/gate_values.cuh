// What the kernels of gates share: noise, values of gates of every kind, four neighbours at a time.
#pragma once

#include "../../gate_math.h"
#include "block_loop.cuh"
#include "launch.cuh"
#include "loop_nest.cuh"

namespace pyprune {
namespace {

// The seed stays on the device, so that nothing waits for it and a CUDA graph draws anew when it changes.
struct Noise {
  const int64_t* seed;  // null without noise
  uint64_t stream;

  __device__ uint64_t key() const { return seed == nullptr ? 0 : static_cast<uint64_t>(*seed); }
};

// Number `index` of the stream. Selected by comparisons: an array with a variable index would lie in memory.
__device__ inline uint32_t noise_word(uint64_t key, uint64_t stream, int64_t index) {
  const PhiloxBlock block = philox(key, stream, static_cast<uint64_t>(index) / 4);
  const uint32_t low = index % 2 == 0 ? block.words[0] : block.words[1];
  const uint32_t high = index % 2 == 0 ? block.words[2] : block.words[3];
  return index % 4 < 2 ? low : high;
}

template <GateRule kRule, class Real>
__device__ inline GateValue<Real> value_by_rule(const Gate& gate, Real logit, uint32_t word) {
  if (!gate.sampled) return gate_value(GateKind<kRule, false, true>{}, gate, logit, word);
  if constexpr (kRule != GateRule::kBernoulli) {
    if (gate.beta != kUsualBeta) return gate_value(GateKind<kRule, true, false>{}, gate, logit, word);
  }
  return gate_value(GateKind<kRule, true, true>{}, gate, logit, word);
}

// z and slope of gate `index`, its kind not known before the kernel runs: for all that is not a plain sweep.
template <class Real>
__device__ inline GateValue<Real> value_at(const Gate& gate, uint64_t key, uint64_t stream, int64_t index,
                                           Real logit) {
  const uint32_t word = gate.sampled ? noise_word(key, stream, index) : 0;
  switch (gate.rule) {
    case GateRule::kBernoulli: return value_by_rule<GateRule::kBernoulli>(gate, logit, word);
    case GateRule::kHardConcrete: return value_by_rule<GateRule::kHardConcrete>(gate, logit, word);
    default: return value_by_rule<GateRule::kStraightThrough>(gate, logit, word);
  }
}

// The bits of x * z: the gated weight, or the gradient of the weight from that of the output.
template <class W, class Real>
__device__ inline typename W::Bits gated(typename W::Bits x, Real z) {
  using Value = typename W::Value;
  return z == Real(0) ? typename W::Bits{0} : W::bits(W::value(x) * static_cast<Value>(z));
}

// Four neighbours of C-contiguous data. kWidth 4: there are four, and one load takes them; kWidth 1: one by one, and
// those from `end` on count as zeros.
template <int kWidth, class T>
__device__ inline Pack<T, 4> load_quad(Width<kWidth>, const T* data, int64_t quad, int64_t end) {
  if constexpr (kWidth == 4) {
    return load_pack<4>(data + 4 * quad);
  } else {
    Pack<T, 4> result{};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * quad + i < end) result.set_in_zeros(i, data[4 * quad + i]);
    }
    return result;
  }
}

template <int kWidth, class T>
__device__ inline void store_quad(Width<kWidth>, T* data, int64_t quad, int64_t end, const Pack<T, 4>& values) {
  if constexpr (kWidth == 4) {
    store_pack(data + 4 * quad, values);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * quad + i < end) data[4 * quad + i] = values.get(i);
    }
  }
}

template <class... T>
__device__ inline bool quads_are_aligned(const T*... data) {
  return (... && (reinterpret_cast<uintptr_t>(data) % sizeof(Pack<T, 4>) == 0));
}

// Calls use(width, quad, load(width, quad)) for all quads, shared among all threads of the grid. Whole quads of
// aligned data come kInFlight at a time and with width 4: nothing is asked of them.
template <int kInFlight, class Load, class Use>
__device__ inline void for_each_quad(int64_t numel, bool aligned, const Load& load, const Use& use) {
  const Width<4> whole{};
  const Width<1> partial{};
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t quad = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
#pragma unroll 1
  for (; aligned && 4 * (quad + (kInFlight - 1) * threads) + 4 <= numel; quad += kInFlight * threads) {
    decltype(load(whole, quad)) items[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) items[i] = load(whole, quad + i * threads);
    keep_loads_above();
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) use(whole, quad + i * threads, items[i]);
  }
#pragma unroll 1
  for (; 4 * quad < numel; quad += threads) use(partial, quad, load(partial, quad));
}

// Calls use(i, load(i)) for all i < count, shared among all threads of the grid, kInFlight loads of each at a time.
template <int kInFlight, class Load, class Use>
__device__ inline void for_each(int64_t count, const Load& load, const Use& use) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
#pragma unroll 1
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; first < count;
       first += kInFlight * threads) {
    decltype(load(first)) items[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * threads < count) items[i] = load(first + i * threads);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * threads < count) use(first + i * threads, items[i]);
    }
  }
}

// Enough blocks for one thread per step, but one wave at most.
inline int64_t blocks_for_steps(int64_t steps) {
  return blocks_for((steps + kThreads - 1) / kThreads);
}

}  // namespace
}  // namespace pyprune
