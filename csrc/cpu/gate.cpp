// gate: weight times gates, and its gradients. With one gate per weight everything happens in one sweep over blocks;
// with shared gates z is computed once per gate first, and the gradient of the logits is summed over segments.
#include "kernels/gate.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "capability.h"
#include "denormals.h"
#include "gate_segments.h"
#include "parallel.h"
#include "tensors.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

static_assert(kChunk % kGateBlock == 0);

struct GateCall {
  Gate gate;
  Noise noise;
  Strided logits;
  GateBlocks blocks;
  bool wide;  // float64 logits

  GateCall(const Tensor& weight, const Tensor& logits_, const std::optional<Tensor>& seed, int64_t stream,
           int64_t rule, double beta, double gamma, double zeta)
      : gate{static_cast<GateRule>(rule), seed.has_value(), beta, gamma, zeta},
        noise{0, static_cast<uint64_t>(stream)},
        logits(strided_of(logits_)),
        blocks(weight.sizes().data(), logits_.sizes().data(), fits(weight, logits_) ? weight.dim() : 0),
        wide(logits.dtype == Dtype::kFloat64) {
    check_weights({weight, logits_});
    STD_TORCH_CHECK(fits(weight, logits_), "each size of the logits must divide the weight's");
    STD_TORCH_CHECK(logits.dtype == Dtype::kFloat32 || logits.dtype == dtype_of(weight), "logits have another dtype");
    if (seed.has_value()) {
      check_seed(*seed);
      check_on_cpu(*seed);
      noise.seed = *static_cast<const uint64_t*>(seed->const_data_ptr());
    }
  }

  int64_t real_size() const { return wide ? 8 : 4; }
  GateRow row(Dtype dtype, int64_t start, int64_t count, const void* weight_row, const void* logit_row) const {
    return {gate, noise, dtype, logits.dtype, start, count, weight_row, logit_row};
  }

 private:
  static bool fits(const Tensor& weight, const Tensor& logits) {
    return GateBlocks::fit(weight.sizes().data(), weight.dim(), logits.sizes().data(), logits.dim());
  }
};

// What a thread copies rows to that do not lie in order; kept from one chunk to the next.
struct Rooms {
  Room weight, logits, grad, out, grad_logits;
};

// Calls row(start, count, rooms) for the chunks of [0, numel), shared among the threads. Whole chunks, because a
// short row of a transposed tensor would take little of each cache line that it touches.
template <class Row>
void for_each_row(int64_t numel, const Row& row) {
  std::vector<Rooms> rooms(thread_count());
  share_tasks((numel + kChunk - 1) / kChunk, numel, [&](int64_t task, int64_t worker) {
    const KeepDenormals exact;
    const int64_t start = task * kChunk;
    row(start, std::min(kChunk, numel - start), rooms[worker]);
  });
}

// Calls block(start, count) for blocks of [0, numel), shared among the threads.
template <class Block>
void for_each_block(int64_t numel, const Block& block) {
  for_each_row(numel, [&](int64_t row, int64_t length, Rooms&) {
    for (int64_t start = row; start < row + length; start += kGateBlock) {
      block(start, std::min(kGateBlock, row + length - start));
    }
  });
}

// Elements [start, start + count) of a tensor as a row to write; put() brings them there if they must be copied. A
// tensor without elements, which is not wanted, has no row.
class Output {
 public:
  Output(const Strided& tensor, int64_t start, int64_t count, Room& room)
      : tensor_(tensor), start_(start), count_(count), row_(tensor.to_write(start, count, room)) {}

  char* row() { return tensor_.numel > 0 ? row_ : nullptr; }
  void put() {
    if (!tensor_.contiguous()) {
      tensor_.scatter(start_, count_, row_);
    }
  }

 private:
  const Strided& tensor_;
  int64_t start_;
  int64_t count_;
  char* row_;
};

void check_like(const Tensor& tensor, const Tensor& model) {
  STD_TORCH_CHECK(tensor.scalar_type() == model.scalar_type() && tensor.sizes().vec() == model.sizes().vec(),
                  "gradients and outputs must be like what they belong to");
}

// z and slope of all logits, for gates that are shared.
struct SharedValues {
  std::unique_ptr<char[]> z, slope;

  SharedValues(const GateCall& call, bool with_slope)
      : z(new char[call.logits.numel * call.real_size()]),
        slope(with_slope ? new char[call.logits.numel * call.real_size()] : nullptr) {
    const auto values = PYPRUNE_KERNEL(gate_values);
    for_each_block(call.logits.numel, [&](int64_t start, int64_t count) {
      Room room;
      const int64_t at = start * call.real_size();
      values(call.gate, call.noise, call.logits.dtype, call.logits.in_a_row(start, count, room), start, count,
             z.get() + at, slope ? slope.get() + at : nullptr);
    });
  }
};

// z of each weight of a segment.
const void* spread(const Segment& segment, bool wide, const char* z, double* room) {
  const auto fill = [&](const auto* from, auto* to) {
    for (int64_t g = 0; g < segment.gates; ++g) {
      std::fill_n(to + g * segment.run, segment.run, from[segment.gate + g]);
    }
    return static_cast<const void*>(to);
  };
  if (segment.run == 1) {
    return z + segment.gate * (wide ? 8 : 4);
  }
  return wide ? fill(reinterpret_cast<const double*>(z), room)
              : fill(reinterpret_cast<const float*>(z), reinterpret_cast<float*>(room));
}

void gate_out(const Tensor weight, const Tensor logits, const std::optional<Tensor> seed, int64_t stream,
              int64_t rule, double beta, double gamma, double zeta, Tensor out) {
  const GateCall call(weight, logits, seed, stream, rule, beta, gamma, zeta);
  check_like(out, weight);
  const Strided w = strided_of(weight), o = strided_of(out);
  const auto multiply = PYPRUNE_KERNEL(gate_multiply);
  if (w.numel == 0) {
    return;
  }
  if (call.blocks.one_per_weight()) {
    const auto forward = PYPRUNE_KERNEL(gate_forward);
    for_each_row(w.numel, [&](int64_t start, int64_t count, Rooms& rooms) {
      Output output(o, start, count, rooms.out);
      forward(call.row(w.dtype, start, count, w.in_a_row(start, count, rooms.weight),
                       call.logits.in_a_row(start, count, rooms.logits)),
              output.row());
      output.put();
    });
  } else {
    const SharedValues shared(call, false);
    Segments(call.blocks).for_each([&](const Segment& segment) {
      alignas(64) double spread_z[kGateBlock];
      Room room, out_room;
      const int64_t count = segment.gates * segment.run;
      Output output(o, segment.start, count, out_room);
      const void* const z = spread(segment, call.wide, shared.z.get(), spread_z);
      multiply(w.dtype, w.in_a_row(segment.start, count, room), call.wide, z, count, output.row());
      output.put();
    });
  }
}

// An output that is not wanted has no elements.
void gate_backward_out(const Tensor grad, const Tensor weight, const Tensor logits, const std::optional<Tensor> seed,
                       int64_t stream, int64_t rule, double beta, double gamma, double zeta, Tensor grad_weight,
                       Tensor grad_logits) {
  const GateCall call(weight, logits, seed, stream, rule, beta, gamma, zeta);
  const Strided g = strided_of(grad), w = strided_of(weight), gw = strided_of(grad_weight),
                gl = strided_of(grad_logits);
  const auto multiply = PYPRUNE_KERNEL(gate_multiply);
  const auto sums_of = PYPRUNE_KERNEL(gate_sums);
  const auto round = PYPRUNE_KERNEL(gate_round);
  const bool for_weight = gw.numel > 0, for_logits = gl.numel > 0;
  check_like(grad, weight);
  check_like(for_weight ? grad_weight : weight, weight);
  check_like(for_logits ? grad_logits : logits, logits);
  if (w.numel == 0) {
    torch::stable::zero_(grad_logits);
    return;
  }
  if (call.blocks.one_per_weight()) {
    const auto backward = PYPRUNE_KERNEL(gate_backward);
    for_each_row(w.numel, [&](int64_t start, int64_t count, Rooms& rooms) {
      Output weight_output(gw, start, count, rooms.out), logit_output(gl, start, count, rooms.grad_logits);
      backward(call.row(w.dtype, start, count, w.in_a_row(start, count, rooms.weight),
                        call.logits.in_a_row(start, count, rooms.logits)),
               g.in_a_row(start, count, rooms.grad), weight_output.row(), logit_output.row());
      weight_output.put();
      logit_output.put();
    });
    return;
  }
  const SharedValues shared(call, for_logits);
  const Segments segments(call.blocks);
  std::vector<double> sums(for_logits ? gl.numel * segments.pieces : 0);
  segments.for_each([&](const Segment& segment) {
    alignas(64) double spread_z[kGateBlock], segment_sums[kGateBlock] = {};
    Room grad_room, room;
    const int64_t count = segment.gates * segment.run;
    const char* const grads = g.in_a_row(segment.start, count, grad_room);
    if (for_weight) {
      Output output(gw, segment.start, count, room);
      const void* const z = spread(segment, call.wide, shared.z.get(), spread_z);
      multiply(w.dtype, grads, call.wide, z, count, output.row());
      output.put();
    }
    if (for_logits) {
      sums_of(w.dtype, grads, w.in_a_row(segment.start, count, room), segment.run, segment.gates, segment_sums);
      for (int64_t i = 0; i < segment.gates; ++i) {
        sums[segment.sum + i * segments.pieces] += segment_sums[i];
      }
    }
  });
  for_each_block(gl.numel, [&](int64_t start, int64_t count) {
    double totals[kGateBlock] = {};
    Room room;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t piece = 0; piece < segments.pieces; ++piece) {
        totals[i] += sums[(start + i) * segments.pieces + piece];
      }
    }
    Output output(gl, start, count, room);
    round(totals, call.wide, shared.slope.get() + start * call.real_size(), count, gl.dtype, output.row());
    output.put();
  });
}

Tensor gate(const Tensor weight, const Tensor logits, const std::optional<Tensor> seed, int64_t stream, int64_t rule,
            double beta, double gamma, double zeta) {
  Tensor out = torch::stable::empty_like(weight);
  gate_out(weight, logits, seed, stream, rule, beta, gamma, zeta, out);
  return out;
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

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("gate", TORCH_BOX(&pyprune::gate));
  m.impl("gate_out", TORCH_BOX(&pyprune::gate_out));
  m.impl("gate_backward", TORCH_BOX(&pyprune::gate_backward));
  m.impl("gate_backward_out", TORCH_BOX(&pyprune::gate_backward_out));
}
