// The gradients of gate, with the noise drawn again:
//   grad_weight = grad * z, exactly +0 where z is zero
//   grad_logits = the sum of grad * weight over the weights that share the gate, times dz / dlogit; 0 where that is 0
// One gate per weight: as the forward pass walks, and the product is taken in float32 (float64 for float64 weights).
//
// Shared gates: products and sums are float64, in an order that the shapes alone decide. The weights of a gate, in C
// order, are cut into pieces. A team of 1 to 32 lanes, enough for the neighbours that share a gate, takes one piece;
// each lane adds up to 64 of them, in fours where neighbours come in fours. The sums of pieces are cut and summed in
// the same way until one is left. So small blocks have a team each, one gate for a whole tensor keeps the device
// busy, and lanes read neighbours in both. grad_weight is written on the same way.
//
// Layout: any strides and alignments. Moves per weight: its own size three times, and that of a logit twice (20 bytes
// in float32); with shared gates, per gate, that of a logit twice, and 16 bytes of z and slope (32 with float64
// logits), and 16 bytes per piece where there are several.
#include "gate_call.cuh"

namespace pyprune {
namespace {

constexpr int kElementsInFlight = 2;
constexpr int kQuadsPerLane = 16;
constexpr int kNumbersPerLane = 32;

// What registers can hold.
template <class W>
constexpr int kQuadsInFlight = sizeof(typename W::Bits) == 8 ? 1 : 2;
template <class W, int kWidth>
constexpr int kStepsInFlight = kWidth == 4                     ? 8 / sizeof(typename W::Bits)
                               : sizeof(typename W::Bits) == 8 ? 4
                                                               : 8;
constexpr int kSumsInFlight = 8;

template <class W, class L>
struct Gradients {
  const typename W::Bits* grad;
  const typename W::Bits* weight;
  typename W::Bits* grad_weight;  // null if not wanted
  typename L::Bits* grad_logits;
};

// ---- one gate per weight ----

template <class W, class L>
__device__ inline typename L::Bits logit_gradient(typename W::Bits grad, typename W::Bits weight,
                                                  typename L::Value slope) {
  using Value = typename W::Value;
  const Value product = W::value(grad) * W::value(weight) * static_cast<Value>(slope);
  return slope == 0 ? typename L::Bits{0} : L::bits(static_cast<typename L::Value>(product));
}

template <class W, class L, class Kind>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    gate_backward_kernel(Gate gate, Noise noise, int64_t numel, Gradients<W, L> tensors,
                         const typename L::Bits* logits) {
  struct Item {
    Pack<typename W::Bits, 4> grads;
    Pack<typename W::Bits, 4> weights;
    Pack<typename L::Bits, 4> logits;
  };
  const uint64_t key = noise.key();
  const bool for_weight = tensors.grad_weight != nullptr, for_logits = tensors.grad_logits != nullptr;
  for_each<kQuadsInFlight<W>>(
      (numel + 3) / 4,
      [&](int64_t quad) {
        Item item{load_quad(tensors.grad, 4 * quad, numel), {}, load_quad(logits, 4 * quad, numel)};
        if (for_logits) item.weights = load_quad(tensors.weight, 4 * quad, numel);
        return item;
      },
      [&](int64_t quad, const Item& item) {
        const PhiloxBlock block = Kind::kSampled ? philox(key, noise.stream, quad) : PhiloxBlock{};
        Pack<typename W::Bits, 4> grad_weights{};
        Pack<typename L::Bits, 4> grad_logits{};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto value = gate_value(Kind{}, gate, L::value(item.logits.get(i)), block.words[i]);
          grad_weights.set_in_zeros(i, gated<W>(item.grads.get(i), value.z));
          grad_logits.set_in_zeros(i, logit_gradient<W, L>(item.grads.get(i), item.weights.get(i), value.slope));
        }
        if (for_weight) store_quad(tensors.grad_weight, 4 * quad, numel, grad_weights);
        if (for_logits) store_quad(tensors.grad_logits, 4 * quad, numel, grad_logits);
      });
}

// The same for any strides. The nest walks weight, grad, logits, the two gradients and the index in C order.
template <class W, class L>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    strided_gate_backward_kernel(Gate gate, Noise noise, int64_t numel, const __grid_constant__ LoopNest<6> nest,
                                 Gradients<W, L> tensors, const typename L::Bits* logits) {
  struct Item {
    typename W::Bits grad;
    typename W::Bits weight;
    typename L::Bits logit;
  };
  const uint64_t key = noise.key();
  const bool for_weight = tensors.grad_weight != nullptr, for_logits = tensors.grad_logits != nullptr;
  for_each<kElementsInFlight>(
      numel,
      [&](int64_t i) {
        const Places<6> places = places_of(nest, i);
        return Item{tensors.grad[places.offset[1]],
                    for_logits ? tensors.weight[places.offset[0]] : typename W::Bits{0}, logits[places.offset[2]]};
      },
      [&](int64_t i, const Item& item) {
        const Places<6> places = places_of(nest, i);
        const auto value = value_at(gate, key, noise.stream, places.offset[5], L::value(item.logit));
        if (for_weight) tensors.grad_weight[places.offset[3]] = gated<W>(item.grad, value.z);
        if (for_logits) {
          tensors.grad_logits[places.offset[4]] = logit_gradient<W, L>(item.grad, item.weight, value.slope);
        }
      });
}

template <class W, class L>
void launch_one_per_weight(const GateCall& call, const Tensor& grad, const Gradients<W, L>& tensors,
                           const Tensor& grad_weight, const Tensor& grad_logits) {
  const auto* const logits = static_cast<const typename L::Bits*>(call.logits.const_data_ptr());
  const int64_t numel = call.weight.numel();
  const LoopNest<6> nest = call.element_nest<5>({&call.weight, &grad, &call.logits,
                                                 tensors.grad_weight == nullptr ? &call.weight : &grad_weight,
                                                 tensors.grad_logits == nullptr ? &call.logits : &grad_logits});
  if (!nest.all_linear()) {
    launch(&strided_gate_backward_kernel<W, L>, blocks_for_steps(numel), kThreads, call.stream, call.gate, call.noise,
           numel, nest, tensors, logits);
    return;
  }
  with_gate_kind(call.gate, [&](auto kind) {
    launch(&gate_backward_kernel<W, L, decltype(kind)>, blocks_for_steps((numel + 3) / 4), kThreads, call.stream,
           call.gate, call.noise, numel, tensors, logits);
  });
}

// ---- shared gates ----

// How the weights of each gate, or the sums of its pieces, are cut. All of it follows from the shapes.
struct Pieces {
  int64_t gates;
  int64_t steps;  // of each gate
  int64_t count;  // pieces of each gate, at least one
  int lanes;      // of a team, a power of two
  int group;      // steps that follow each other in one lane: 4 if a step is one weight of four neighbours
  int size;       // steps of a piece

  Pieces(int64_t gates_, int64_t steps_, int lanes_, int group_, int groups_per_lane)
      : gates(gates_), steps(steps_), lanes(lanes_), group(group_), size(lanes_ * group_ * groups_per_lane) {
    count = std::max<int64_t>(1, (steps + size - 1) / size);
  }
  int64_t teams() const { return gates * count; }
};

// Calls finish(gate, piece, sum) once for each piece. begin(gate) returns what loads a step and adds it to a sum.
template <int kInFlight, class Begin, class Finish>
__device__ inline void sum_pieces(const Pieces& pieces, const Begin& begin, const Finish& finish) {
  const int teams_per_block = kThreads / pieces.lanes;
  const int lane = static_cast<int>(threadIdx.x) % pieces.lanes;
  const int64_t teams = pieces.gates * pieces.count;
  // Number k of this lane; it grows with k.
  const auto step_of = [&](int k) {
    return pieces.group == 1 ? k * pieces.lanes + lane : (k / 4 * pieces.lanes + lane) * 4 + k % 4;
  };
  // Whole blocks go on together, as the lanes of a warp meet below.
#pragma unroll 1
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * teams_per_block; first < teams;
       first += static_cast<int64_t>(gridDim.x) * teams_per_block) {
    const int64_t team = first + static_cast<int>(threadIdx.x) / pieces.lanes;
    const int64_t piece = pieces.count == 1 ? 0 : team / pieces.gates;
    const int64_t gate = team - piece * pieces.gates;
    double sum = 0;
    if (team < teams) {
      const int64_t start = piece * pieces.size;
      const int end = static_cast<int>(pieces.steps - start < pieces.size ? pieces.steps - start : pieces.size);
      const auto terms = begin(gate);
#pragma unroll 1
      for (int k = 0; step_of(k) < end; k += kInFlight) {
        decltype(terms.load(start)) items[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (step_of(k + i) < end) items[i] = terms.load(start + step_of(k + i));
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          if (step_of(k + i) < end) terms.add(start + step_of(k + i), items[i], sum);
        }
      }
    }
    for (int half = pieces.lanes / 2; half > 0; half /= 2) {
      sum += __shfl_down_sync(kWholeWarp, sum, half, pieces.lanes);
    }
    if (team < teams && lane == 0) finish(gate, piece, sum);
  }
}

// Where a sum goes: to the sums of pieces, or, from the only piece, to the gradient of the logit.
template <class L>
struct Target {
  double* sums;  // of piece p of gate g: sums[p * gates + g]
  const typename L::Value* slope;
  typename L::Bits* grad_logits;

  __device__ void put(const Pieces& pieces, int64_t gate, int64_t piece, int64_t grad_logit_at, double sum) const {
    if (pieces.count > 1) {
      sums[piece * pieces.gates + gate] = sum;
    } else {
      const typename L::Value s = slope[gate];
      const auto rounded = static_cast<typename L::Value>(sum * static_cast<double>(s));
      grad_logits[grad_logit_at] = s == 0 ? typename L::Bits{0} : L::bits(rounded);
    }
  }
};

// The products of one gate, kWidth neighbours a step. The nest walks weight, grad and grad_weight over its weights.
template <class W, class L, int kWidth>
struct Products {
  using Bits = typename W::Bits;
  using Step = Pack<Bits, kWidth>;
  struct Item {
    Step weights;
    Step grads;
  };

  const LoopNest<3>& nest;
  const Gradients<W, L>& tensors;
  Places<4> gate;
  typename L::Value z;

  __device__ Item load(int64_t step) const {
    const Places<3> places = places_of(nest, step * kWidth);
    return {load_step(tensors.weight + gate.offset[0] + places.offset[0], inner_stride(0)),
            load_step(tensors.grad + gate.offset[1] + places.offset[1], inner_stride(1))};
  }
  __device__ void add(int64_t step, const Item& item, double& sum) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum += static_cast<double>(W::value(item.grads.get(i))) * static_cast<double>(W::value(item.weights.get(i)));
    }
    if (tensors.grad_weight == nullptr) return;
    Step result{};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) result.set_in_zeros(i, gated<W>(item.grads.get(i), z));
    const Places<3> places = places_of(nest, step * kWidth);
    store_step(tensors.grad_weight + gate.offset[2] + places.offset[2], inner_stride(2), result);
  }

 private:
  __device__ int64_t inner_stride(int tensor) const { return kWidth == 1 ? 0 : nest.strides[tensor][nest.loops - 1]; }
  __device__ static bool as_pack(const Bits* first, int64_t stride) {
    return kWidth > 1 && stride == 1 && reinterpret_cast<uintptr_t>(first) % sizeof(Step) == 0;
  }
  __device__ static Step load_step(const Bits* first, int64_t stride) {
    if (as_pack(first, stride)) return load_pack<kWidth>(first);
    Step step{};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) step.set_in_zeros(i, first[i * stride]);
    return step;
  }
  __device__ static void store_step(Bits* first, int64_t stride, const Step& step) {
    if (as_pack(first, stride)) return store_pack(first, step);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) first[i * stride] = step.get(i);
  }
};

// `gates` walks weight, grad, grad_weight and grad_logits over the gates.
template <class W, class L, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sum_products_kernel(Pieces pieces, const __grid_constant__ LoopNest<4> gates,
                        const __grid_constant__ LoopNest<3> weights, const __grid_constant__ Gradients<W, L> tensors,
                        const typename L::Value* z, Target<L> target) {
  sum_pieces<kStepsInFlight<W, kWidth>>(
      pieces,
      [&](int64_t gate) {
        const typename L::Value value = tensors.grad_weight != nullptr ? z[gate] : typename L::Value(0);
        return Products<W, L, kWidth>{weights, tensors, places_of(gates, gate), value};
      },
      [&](int64_t gate, int64_t piece, double sum) {
        target.put(pieces, gate, piece, places_of(gates, gate).offset[3], sum);
      });
}

struct Sums {
  const double* sums;
  int64_t gate;
  int64_t gates;
  __device__ double load(int64_t step) const { return sums[step * gates + gate]; }
  __device__ void add(int64_t, double term, double& sum) const { sum += term; }
};

template <class L>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sum_sums_kernel(Pieces pieces, const __grid_constant__ LoopNest<4> gates, const double* sums, Target<L> target) {
  sum_pieces<kSumsInFlight>(
      pieces, [&](int64_t gate) { return Sums{sums, gate, pieces.gates}; },
      [&](int64_t gate, int64_t piece, double sum) {
        target.put(pieces, gate, piece, places_of(gates, gate).offset[3], sum);
      });
}

template <class W, class L>
void launch_shared(const GateCall& call, const Tensor& grad, const Gradients<W, L>& tensors, Tensor& grad_weight,
                   const Tensor& grad_logits) {
  using Value = typename L::Value;
  const Tensor &weight = call.weight, &logits = call.logits;
  const bool for_weight = tensors.grad_weight != nullptr, for_logits = tensors.grad_logits != nullptr;
  const int64_t gates = logits.numel();
  const DeviceArray<Value> z(logits, gates);
  if (!for_logits) {
    call.compute_values(L{}, z.data, nullptr);
    call.multiply(W{}, grad, z.data, grad_weight);
    return;
  }
  const DeviceArray<Value> slope(logits, gates);
  call.compute_values(L{}, z.data, slope.data);

  const Tensor& weight_like = for_weight ? grad_weight : weight;
  Loops<4> gate_loops;
  Loops<3> weight_loops;
  for (int64_t d = 0; d < weight.dim(); ++d) {
    const int64_t run = weight.size(d) / logits.size(d);
    const int64_t a = weight.stride(d), b = grad.stride(d), c = weight_like.stride(d);
    gate_loops.add(logits.size(d), {a * run, b * run, c * run, grad_logits.stride(d)});
    weight_loops.add(run, {a, b, c});
  }
  const LoopNest<4> gate_nest = gate_loops.nest(Order::kLogical);
  const auto launch_sums = [&](const auto& kernel, const Pieces& pieces, const auto&... arguments) {
    launch(kernel, blocks_for_steps(pieces.teams() * pieces.lanes), kThreads, call.stream, pieces, gate_nest,
           arguments...);
  };
  const LoopNest<3> weight_nest = weight_loops.nest(Order::kLogical);
  // Neighbours that share a gate are taken in fours by one lane, with one load where they lie in one loop.
  const int64_t run = GateBlocks(weight.sizes().data(), logits.sizes().data(), weight.dim()).run;
  const int group = run % 4 == 0 ? 4 : 1;
  const bool quads = group == 4 && weight_nest.sizes[weight_nest.loops - 1] % 4 == 0;
  int lanes = 1;
  while (lanes < 32 && lanes * group < run) lanes *= 2;
  const int64_t terms = weight.numel() / gates;
  const int per_lane = group == 4 ? kQuadsPerLane : kNumbersPerLane;
  Pieces pieces(gates, quads ? terms / 4 : terms, lanes, quads ? 1 : group, per_lane);
  // Sums of sums go to the other half of the buffer, and back.
  const int64_t room = pieces.count > 1 ? pieces.teams() : 0;
  const DeviceArray<double> sums(logits, 2 * room);
  double *from = sums.data, *to = sums.data + room;
  launch_sums(quads ? &sum_products_kernel<W, L, 4> : &sum_products_kernel<W, L, 1>, pieces, weight_nest, tensors,
              z.data, Target<L>{from, slope.data, tensors.grad_logits});
  while (pieces.count > 1) {
    pieces = Pieces(gates, pieces.count, lanes, 1, kNumbersPerLane);
    launch_sums(&sum_sums_kernel<L>, pieces, from, Target<L>{to, slope.data, tensors.grad_logits});
    std::swap(from, to);
  }
}

// ---- launches ----

// A gradient that is not wanted has no elements.
void gate_backward_out(const Tensor grad, const Tensor weight, const Tensor logits, const std::optional<Tensor> seed,
                       int64_t stream, int64_t rule, double beta, double gamma, double zeta, Tensor grad_weight,
                       Tensor grad_logits) {
  const GateCall call(weight, logits, seed, stream, rule, beta, gamma, zeta);
  call.check_like(grad, weight);
  const bool for_weight = grad_weight.numel() > 0, for_logits = grad_logits.numel() > 0;
  if (for_weight) call.check_like(grad_weight, weight);
  if (for_logits) call.check_like(grad_logits, logits);
  if (!for_weight && !for_logits) return;
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  if (weight.numel() == 0) {
    torch::stable::zero_(grad_logits);  // sums of nothing
    return;
  }
  call.with_types([&]<class W, class L>(W, L) {
    using Bits = typename W::Bits;
    const Gradients<W, L> tensors{
        static_cast<const Bits*>(grad.const_data_ptr()), static_cast<const Bits*>(weight.const_data_ptr()),
        for_weight ? static_cast<Bits*>(grad_weight.mutable_data_ptr()) : nullptr,
        for_logits ? static_cast<typename L::Bits*>(grad_logits.mutable_data_ptr()) : nullptr};
    if (call.one_per_weight) {
      launch_one_per_weight(call, grad, tensors, grad_weight, grad_logits);
    } else {
      launch_shared(call, grad, tensors, grad_weight, grad_logits);
    }
  });
}

std::tuple<Tensor, Tensor> gate_backward(const Tensor grad, const Tensor weight, const Tensor logits,
                                         const std::optional<Tensor> seed, int64_t stream, int64_t rule, double beta,
                                         double gamma, double zeta, bool for_weight, bool for_logits) {
  const auto like = [](const Tensor& tensor, bool wanted) {
    return wanted ? torch::stable::empty_like(tensor) : torch::stable::new_empty(tensor, {0});
  };
  Tensor grad_weight = like(weight, for_weight), grad_logits = like(logits, for_logits);
  gate_backward_out(grad, weight, logits, seed, stream, rule, beta, gamma, zeta, grad_weight, grad_logits);
  return {grad_weight, grad_logits};
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("gate_backward", TORCH_BOX(&pyprune::gate_backward));
  m.impl("gate_backward_out", TORCH_BOX(&pyprune::gate_backward_out));
}
