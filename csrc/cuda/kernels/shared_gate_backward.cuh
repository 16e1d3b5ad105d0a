// The gradients of gates that several weights share: products and sums are float64, in an order that the shapes alone
// decide. The weights of a gate, in C order, are cut into pieces. A team of 1 to 32 lanes, enough for the neighbours
// that share a gate, takes one piece; each lane adds up to 64 of them, in fours where neighbours come in fours. The
// sums of pieces are cut and summed in the same way until one is left. So small blocks have a team each, one gate for
// a whole tensor keeps the device busy, and lanes read neighbours in both. grad_weight is written on the same way.
//
// Layout: any strides and alignments. Moves per weight: its own size three times; per gate, the size of a logit
// twice, 16 bytes of z and slope (32 with float64 logits), and 16 bytes per piece where there are several.
#pragma once

#include "gate_backward.cuh"

namespace pyprune {
namespace {

constexpr int kQuadsPerLane = 16;
constexpr int kNumbersPerLane = 32;
template <class W, int kWidth>
constexpr int kProductsInFlight = kWidth == 4                     ? 8 / sizeof(typename W::Bits)
                                  : sizeof(typename W::Bits) == 8 ? 4
                                                                  : 8;
constexpr int kSumsInFlight = 8;

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
  sum_pieces<kProductsInFlight<W, kWidth>>(
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

// How the products of all gates are summed, and the room that this takes.
struct SharedSums {
  int64_t gates;
  int lanes;
  bool quads;  // a step is four neighbours
  Pieces pieces;
  int64_t room;  // sums of sums go to the other half of the buffer, and back

  // `run` weights of a gate follow each other; the nest is that of Products.
  SharedSums(int64_t gates_, int64_t weights, int64_t run, const LoopNest<3>& nest)
      : gates(gates_),
        lanes(lanes_for(run)),
        quads(run % 4 == 0 && nest.sizes[nest.loops - 1] % 4 == 0),
        pieces(gates, quads ? weights / gates / 4 : weights / gates, lanes, quads ? 1 : group_of(run),
               run % 4 == 0 ? kQuadsPerLane : kNumbersPerLane),
        room(pieces.count > 1 ? pieces.teams() : 0) {}

 private:
  // Neighbours that share a gate are taken in fours by one lane, with one load where they lie in one loop.
  static int group_of(int64_t run) { return run % 4 == 0 ? 4 : 1; }
  static int lanes_for(int64_t run) {
    int lanes = 1;
    while (lanes < 32 && lanes * group_of(run) < run) lanes *= 2;
    return lanes;
  }
};

// `gates` and `weights` are the nests of sum_products_kernel; `sums` has twice the room.
template <class W, class L>
void launch_shared_gate_backward(const SharedSums& plan, const LoopNest<4>& gates, const LoopNest<3>& weights,
                                 const Gradients<W, L>& tensors, const typename L::Value* z,
                                 const typename L::Value* slope, double* sums, cudaStream_t stream) {
  Pieces pieces = plan.pieces;
  double *from = sums, *to = sums + plan.room;
  const auto launch_sums = [&](const auto& kernel, const auto&... arguments) {
    launch(kernel, blocks_for_steps(pieces.teams() * pieces.lanes), kThreads, stream, pieces, gates, arguments...);
  };
  launch_sums(plan.quads ? &sum_products_kernel<W, L, 4> : &sum_products_kernel<W, L, 1>, weights, tensors, z,
              Target<L>{from, slope, tensors.grad_logits});
  while (pieces.count > 1) {
    pieces = Pieces(plan.gates, pieces.count, plan.lanes, 1, kNumbersPerLane);
    launch_sums(&sum_sums_kernel<L>, from, Target<L>{to, slope, tensors.grad_logits});
    std::swap(from, to);
  }
}

}  // namespace
}  // namespace pyprune
