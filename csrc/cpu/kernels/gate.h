// The loops of gates, on blocks of at most kGateBlock elements that stay in the first-level cache:
//
// - draw_words: noise, as 32-bit words.
// - gate_values: z and dz/dlogit from logits and noise (gate_math.h), which is drawn here and kept no longer.
// - gate_multiply: out = z == 0 ? +0 : x * z, the gated weight, or the gradient of the weight from that of the
// output.
// - gate_slopes: gradient of logits with one weight each: grad * weight * slope, 0 where the slope is.
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

// Rows that the next block will read, fetched from memory while the noise of this one is drawn, which needs none.
struct Ahead {
  int rows;
  const char* row[3];
  int64_t item_size[3];
};

}  // namespace pyprune

#define PYPRUNE_DECLARE_GATE                                                                                       \
  void draw_words(const Noise& noise, int64_t first, int64_t count, uint32_t* words, const Ahead& ahead);          \
  void gate_values(const Gate& gate, const Noise& noise, Dtype dtype, const void* logits, int64_t first,           \
                   int64_t count, void* z, void* slope, const Ahead& ahead);                                       \
  void gate_multiply(Dtype dtype, const void* x, bool wide, const void* z, int64_t count, void* out);              \
  void gate_slopes(Dtype dtype, const void* grad, const void* weight, bool wide, const void* slope, int64_t count, \
                   Dtype logits_dtype, void* out);                                                                 \
  void gate_sums(Dtype dtype, const void* grad, const void* weight, int64_t run, int64_t gates, double* sums);     \
  void gate_round(const double* sums, bool wide, const void* slope, int64_t count, Dtype logits_dtype, void* out);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_GATE)
