// The loops of gates. Rows of any length with one gate per weight:
//
// - gate_forward: weight times gates.
// - gate_backward: the gradients of weight and logits; one that is null is not wanted.
//
// They go in blocks of at most kGateBlock elements, which stay in the first-level cache, through these:
//
// - draw_words: noise, as 32-bit words.
// - gate_values: z and dz/dlogit from logits and noise (gate_math.h), which is drawn here and kept no longer.
// - gate_multiply: out = z == 0 ? +0 : x * z, the gated weight, or the gradient of the weight from that of the
// output.
// - gate_sums: sums[g] += sum of grad * weight over the `run` weights of gate g, in float64 and in a fixed order.
// - gate_round: gradient of logits from such sums: sum * slope, 0 where the slope is.
//
// z and slope are double if the logits are (`wide`), else float.
#pragma once

#include <cstdint>

#include "../../dtype.h"
#include "../../gate_math.h"
#include "capability_namespace.h"

namespace pyprune {

constexpr int64_t kGateBlock = 256;  // a multiple of four, as Philox draws four numbers at a time

struct Noise {
  uint64_t seed;
  uint64_t stream;
};

// Gates with one weight each, one after the other.
struct GateRow {
  Gate gate;
  Noise noise;
  Dtype dtype;  // of the weight
  Dtype logits_dtype;
  int64_t first;  // index of the first gate
  int64_t count;
  const void* weight;
  const void* logits;
};

}  // namespace pyprune

#define PYPRUNE_DECLARE_GATE                                                                                   \
  void gate_forward(const GateRow& row, void* out);                                                            \
  void gate_backward(const GateRow& row, const void* grad, void* grad_weight, void* grad_logits);              \
  void draw_words(const Noise& noise, int64_t first, int64_t count, uint32_t* words);                          \
  void gate_values(const Gate& gate, const Noise& noise, Dtype dtype, const void* logits, int64_t first,       \
                   int64_t count, void* z, void* slope);                                                       \
  void gate_multiply(Dtype dtype, const void* x, bool wide, const void* z, int64_t count, void* out);          \
  void gate_sums(Dtype dtype, const void* grad, const void* weight, int64_t run, int64_t gates, double* sums); \
  void gate_round(const double* sums, bool wide, const void* slope, int64_t count, Dtype logits_dtype, void* out);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_GATE)
