// What forward and backward of gates share: the call as the host sees it, and the values of gates of every kind.
#pragma once

#include <array>
#include <optional>

#include "../gate_blocks.h"
#include "../gate_math.h"
#include "kernels/block_loop.cuh"
#include "kernels/loop_nest.cuh"
#include "upload.cuh"

// Hidden, as torch's stable types are.
HIDDEN_NAMESPACE_BEGIN(pyprune)
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

// Four neighbours of C-contiguous data from a multiple of four on; those from `end` on count as zeros.
template <class T>
__device__ inline Pack<T, 4> load_quad(const T* data, int64_t at, int64_t end) {
  if (reinterpret_cast<uintptr_t>(data) % sizeof(Pack<T, 4>) == 0 && at + 4 <= end) return load_pack<4>(data + at);
  Pack<T, 4> quad{};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (at + i < end) quad.set_in_zeros(i, data[at + i]);
  }
  return quad;
}

template <class T>
__device__ inline void store_quad(T* data, int64_t at, int64_t end, const Pack<T, 4>& quad) {
  if (reinterpret_cast<uintptr_t>(data) % sizeof(quad) == 0 && at + 4 <= end) return store_pack(data + at, quad);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (at + i < end) data[at + i] = quad.get(i);
  }
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
    for_each<2>((numel + 3) / 4,
                [&](int64_t quad) {
                  Item item{load_quad(x, 4 * quad, numel), {}};
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
                [&](int64_t quad, const Item& item) {
                  Pack<typename W::Bits, 4> result{};
#pragma unroll
                  for (int i = 0; i < 4; ++i) result.set_in_zeros(i, gated<W>(item.x.get(i), item.z[i]));
                  store_quad(out, 4 * quad, numel, result);
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

// Enough blocks for one thread per step, but one wave at most.
inline int64_t blocks_for_steps(int64_t steps) {
  return blocks_for((steps + kThreads - 1) / kThreads);
}

// A weight, its logits and how they gate it.
class GateCall {
 public:
  GateCall(const Tensor& weight_, const Tensor& logits_, const std::optional<Tensor>& seed, int64_t stream_number,
           int64_t rule, double beta, double gamma, double zeta)
      : weight(weight_),
        logits(logits_),
        gate{static_cast<GateRule>(rule), seed.has_value(), beta, gamma, zeta},
        noise{nullptr, static_cast<uint64_t>(stream_number)},
        one_per_weight(weight_.numel() == logits_.numel()),
        stream(nullptr) {
    check_weights({weight, logits});
    on_device(logits);
    const Dtype dtype = dtype_of(logits);
    STD_TORCH_CHECK(dtype == Dtype::kFloat32 || dtype == dtype_of(weight),
                    "logits must be float32 or like the weight");
    const bool fits = GateBlocks::fit(weight.sizes().data(), weight.dim(), logits.sizes().data(), logits.dim());
    STD_TORCH_CHECK(fits, "each size of the logits must divide the weight's");
    if (seed.has_value()) {
      on_device(*seed);
      STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, "seed must be one int64");
      noise.seed = static_cast<const int64_t*>(seed->const_data_ptr());
    }
    stream = current_stream(weight);
  }

  // That this can be read or written in place of `model`.
  void check_like(const Tensor& tensor, const Tensor& model) const {
    on_device(tensor);
    STD_TORCH_CHECK(tensor.scalar_type() == model.scalar_type() && tensor.sizes().vec() == model.sizes().vec(),
                    "gradients and outputs must have the dtype and shape of what they belong to");
  }

  // Calls use(W{}, L{}) with the types of weight and logits.
  template <class Use>
  void with_types(const Use& use) const {
    const bool float32_logits = dtype_of(logits) == Dtype::kFloat32;
    switch (dtype_of(weight)) {
      case Dtype::kFloat64: return float32_logits ? use(Float64{}, Float32{}) : use(Float64{}, Float64{});
      case Dtype::kFloat16: return float32_logits ? use(Float16{}, Float32{}) : use(Float16{}, Float16{});
      case Dtype::kBFloat16: return float32_logits ? use(BFloat16{}, Float32{}) : use(BFloat16{}, BFloat16{});
      default: return use(Float32{}, Float32{});
    }
  }

  // One loop per dimension, over tensors of the weight's shape; the last is no tensor but the index in C order.
  template <size_t kTensors>
  LoopNest<kTensors + 1> element_nest(const std::array<const Tensor*, kTensors>& tensors) const {
    Loops<kTensors + 1> loops;
    int64_t index = weight.numel();
    for (int64_t d = 0; d < weight.dim(); ++d) {
      index /= std::max<int64_t>(1, weight.size(d));
      std::array<int64_t, kTensors + 1> strides{};
      for (size_t t = 0; t < kTensors; ++t) strides[t] = tensors[t]->stride(d);
      strides[kTensors] = index;
      loops.add(weight.size(d), strides);
    }
    return loops.nest(Order::kAny);
  }

  // z, and slope if wanted, of all gates in C order, where they are shared.
  template <class L>
  void compute_values(L, typename L::Value* z, typename L::Value* slope) const {
    Loops<1> loops;
    for (int64_t d = 0; d < logits.dim(); ++d) loops.add(logits.size(d), {logits.stride(d)});
    launch(&values_kernel<L>, blocks_for_steps(logits.numel()), kThreads, stream, gate, noise, logits.numel(),
           loops.nest(Order::kLogical), static_cast<const typename L::Bits*>(logits.const_data_ptr()), z, slope);
  }

  // out = x * z for tensors of the weight's shape and dtype and the values of shared gates.
  template <class W, class Real>
  void multiply(W, const Tensor& x, const Real* z, Tensor& out) const {
    if (weight.numel() == 0) return;
    Loops<3> loops;
    int64_t gates_left = logits.numel();
    for (int64_t d = 0; d < weight.dim(); ++d) {
      const int64_t gates = logits.size(d), run = weight.size(d) / gates;
      gates_left /= gates;
      loops.add(gates, {x.stride(d) * run, out.stride(d) * run, gates_left});
      loops.add(run, {x.stride(d), out.stride(d), 0});
    }
    const LoopNest<3> nest = loops.nest(Order::kAny);
    const bool quads = nest.linear(0) && nest.linear(1);
    const auto kernel = quads ? &multiply_kernel<W, Real, true> : &multiply_kernel<W, Real, false>;
    launch(kernel, blocks_for_steps(quads ? (weight.numel() + 3) / 4 : weight.numel()), kThreads, stream,
           weight.numel(), nest, static_cast<const typename W::Bits*>(x.const_data_ptr()),
           static_cast<typename W::Bits*>(out.mutable_data_ptr()), z);
  }

  const Tensor& weight;
  const Tensor& logits;
  Gate gate;
  Noise noise;
  bool one_per_weight;
  cudaStream_t stream;

 private:
  // A pointer of another device would take the whole process's CUDA context down.
  void on_device(const Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == weight.get_device_index(),
                    "all tensors must be on one CUDA device");
  }
};

}  // namespace
HIDDEN_NAMESPACE_END(pyprune)
