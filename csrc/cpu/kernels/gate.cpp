#include "gate.h"

#include <algorithm>

#include "philox_block.h"
#include "rows.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

constexpr int kWordsPerCall = 4 * kCounters;
// Sums run in this many lanes, whatever the instruction set.
constexpr int64_t kSumLanes = 8;

template <class Real, class Kind>
void values(Kind kind, const Gate& gate, const Real* __restrict logits, const uint32_t* __restrict words,
            int64_t count, Real* __restrict z, Real* __restrict slope) {
  if (slope == nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      z[i] = gate_value(kind, gate, logits[i], words[i]).z;
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const GateValue<Real> value = gate_value(kind, gate, logits[i], words[i]);
      z[i] = value.z;
      slope[i] = value.slope;
    }
  }
}

template <class A, class Real>
void multiply(const A* __restrict x, const Real* __restrict z, int64_t count, A* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    const A product = x[i] * static_cast<A>(z[i]);
    out[i] = z[i] == 0 ? A(0) : product;
  }
}

template <class A, class Real>
void slopes(const A* __restrict grad, const A* __restrict weight, const Real* __restrict slope, int64_t count,
            Real* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    const Real product = static_cast<Real>(grad[i] * weight[i] * static_cast<A>(slope[i]));
    out[i] = slope[i] == 0 ? Real(0) : product;
  }
}

template <class A>
double sum_products(const A* x, const A* y, int64_t count) {
  double lanes[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    for (int64_t j = 0; j < kSumLanes; ++j) {
      lanes[j] += static_cast<double>(x[i + j]) * static_cast<double>(y[i + j]);
    }
  }
  for (int64_t j = 0; i + j < count; ++j) {
    lanes[j] += static_cast<double>(x[i + j]) * static_cast<double>(y[i + j]);
  }
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

template <class A>
void sums_of_runs(const A* __restrict grad, const A* __restrict weight, int64_t run, int64_t gates,
                  double* __restrict sums) {
  if (run == 1) {
    for (int64_t g = 0; g < gates; ++g) {
      sums[g] += static_cast<double>(grad[g]) * static_cast<double>(weight[g]);
    }
  } else {
    for (int64_t g = 0; g < gates; ++g) {
      sums[g] += sum_products(grad + g * run, weight + g * run, run);
    }
  }
}

template <class Real>
void rounded(const double* __restrict sums, const Real* __restrict slope, int64_t count, Real* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = slope[i] == 0 ? Real(0) : static_cast<Real>(sums[i] * static_cast<double>(slope[i]));
  }
}

// Rows that the next block will read, fetched from memory while the noise of this one is drawn, which needs none.
struct Ahead {
  int rows = 0;
  const char* row[3];
  int64_t item_size[3];

  void add(const void* data, Dtype dtype) {
    row[rows] = static_cast<const char*>(data);
    item_size[rows++] = pyprune::item_size(dtype);
  }
};

inline void draw(const Noise& noise, int64_t first, int64_t count, uint32_t* words, const Ahead& ahead) {
  const auto [seed, stream] = noise;  // copies, that writing words cannot change
  const Ahead next = ahead;
  uint64_t block = static_cast<uint64_t>(first) / 4;
  int64_t at = 0;  // in elements, of the rows ahead
  for (; count >= kWordsPerCall;
       count -= kWordsPerCall, words += kWordsPerCall, block += kCounters, at += kWordsPerCall) {
    for (int i = 0; i < next.rows; ++i) {
      const char* const line = next.row[i] + at * next.item_size[i];
      __builtin_prefetch(line);
      if constexpr (kWordsPerCall > 16) {
        __builtin_prefetch(line + 64);
      }
    }
    philox_lanes(seed, stream, block, words);
  }
  if (count > 0) {
    uint32_t rest[kWordsPerCall];
    philox_lanes(seed, stream, block, rest);
    std::memcpy(words, rest, count * sizeof(uint32_t));
  }
}

// Called per block: inlined into forward and backward as well, it took a third of the compilation.
[[gnu::noinline]] void values_ahead(const Gate& gate, const Noise& noise, Dtype dtype, const void* logits,
                                    int64_t first, int64_t count, void* z, void* slope, const Ahead& ahead) {
  alignas(64) uint32_t words[kGateBlock];
  if (gate.sampled) {
    draw(noise, first, count, words, ahead);
  }
  with_gate_kind(gate, [&](auto kind) {
    if (dtype == Dtype::kFloat64) {
      values(kind, gate, static_cast<const double*>(logits), words, count, static_cast<double*>(z),
             static_cast<double*>(slope));
    } else {
      alignas(64) float room[kGateBlock];
      values(kind, gate, widened(dtype, logits, count, room), words, count, static_cast<float*>(z),
             static_cast<float*>(slope));
    }
  });
}

// Gradient of logits with one weight each: grad * weight * slope, 0 where the slope is.
void gate_slopes(Dtype dtype, const void* grad, const void* weight, bool wide, const void* slope, int64_t count,
                 Dtype logits_dtype, void* out) {
  with_real(wide, [&](auto real) {
    using Real = decltype(real);
    alignas(64) Real products[kGateBlock];
    const bool direct = wide || logits_dtype == Dtype::kFloat32;
    Real* const target = direct ? static_cast<Real*>(out) : products;
    if (dtype == Dtype::kFloat64) {
      slopes(static_cast<const double*>(grad), static_cast<const double*>(weight), static_cast<const Real*>(slope),
             count, target);
    } else {
      alignas(64) float grad_room[kGateBlock], weight_room[kGateBlock];
      slopes(widened(dtype, grad, count, grad_room), widened(dtype, weight, count, weight_room),
             static_cast<const Real*>(slope), count, target);
    }
    if constexpr (sizeof(Real) == 4) {
      narrow(logits_dtype, products, count, out);
    }
  });
}

// Calls visit(start, count, ahead) for the blocks of a row; `rows` are what each block reads.
template <class Visit>
void for_each_block(int64_t count, const Ahead& rows, const Visit& visit) {
  for (int64_t start = 0; start < count; start += kGateBlock) {
    Ahead ahead = rows;
    if (start + 2 * kGateBlock > count) {
      ahead.rows = 0;
    }
    for (int i = 0; i < ahead.rows; ++i) {
      ahead.row[i] += (start + kGateBlock) * ahead.item_size[i];
    }
    visit(start, std::min(kGateBlock, count - start), ahead);
  }
}

template <class T>
T* at(T* data, int64_t index, Dtype dtype) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(data) + index * item_size(dtype);
}

}  // namespace

void draw_words(const Noise& noise, int64_t first, int64_t count, uint32_t* words) {
  draw(noise, first, count, words, Ahead{});
}

void gate_values(const Gate& gate, const Noise& noise, Dtype dtype, const void* logits, int64_t first, int64_t count,
                 void* z, void* slope) {
  values_ahead(gate, noise, dtype, logits, first, count, z, slope, Ahead{});
}

void gate_multiply(Dtype dtype, const void* x, bool wide, const void* z, int64_t count, void* out) {
  if (dtype == Dtype::kFloat64) {
    with_real(wide, [&](auto real) {
      multiply(static_cast<const double*>(x), static_cast<const decltype(real)*>(z), count,
               static_cast<double*>(out));
    });
  } else {
    alignas(64) float room[kGateBlock], products[kGateBlock];
    float* const target = dtype == Dtype::kFloat32 ? static_cast<float*>(out) : products;
    multiply(widened(dtype, x, count, room), static_cast<const float*>(z), count, target);
    narrow(dtype, products, count, out);
  }
}

void gate_sums(Dtype dtype, const void* grad, const void* weight, int64_t run, int64_t gates, double* sums) {
  if (dtype == Dtype::kFloat64) {
    sums_of_runs(static_cast<const double*>(grad), static_cast<const double*>(weight), run, gates, sums);
  } else {
    alignas(64) float grad_room[kGateBlock], weight_room[kGateBlock];
    const int64_t count = run * gates;
    sums_of_runs(widened(dtype, grad, count, grad_room), widened(dtype, weight, count, weight_room), run, gates,
                 sums);
  }
}

void gate_round(const double* sums, bool wide, const void* slope, int64_t count, Dtype logits_dtype, void* out) {
  with_real(wide, [&](auto real) {
    using Real = decltype(real);
    alignas(64) Real values[kGateBlock];
    const bool direct = wide || logits_dtype == Dtype::kFloat32;
    rounded(sums, static_cast<const Real*>(slope), count, direct ? static_cast<Real*>(out) : values);
    if constexpr (sizeof(Real) == 4) {
      narrow(logits_dtype, values, count, out);
    }
  });
}

void gate_forward(const GateRow& row, void* out) {
  const bool wide = row.logits_dtype == Dtype::kFloat64;
  Ahead rows;
  rows.add(row.logits, row.logits_dtype);
  rows.add(row.weight, row.dtype);
  for_each_block(row.count, rows, [&](int64_t start, int64_t count, const Ahead& ahead) {
    alignas(64) double z[kGateBlock];
    values_ahead(row.gate, row.noise, row.logits_dtype, at(row.logits, start, row.logits_dtype), row.first + start,
                 count, z, nullptr, ahead);
    gate_multiply(row.dtype, at(row.weight, start, row.dtype), wide, z, count, at(out, start, row.dtype));
  });
}

void gate_backward(const GateRow& row, const void* grad, void* grad_weight, void* grad_logits) {
  const bool wide = row.logits_dtype == Dtype::kFloat64;
  Ahead rows;
  rows.add(row.logits, row.logits_dtype);
  rows.add(row.weight, row.dtype);
  rows.add(grad, row.dtype);
  for_each_block(row.count, rows, [&](int64_t start, int64_t count, const Ahead& ahead) {
    alignas(64) double z[kGateBlock], slope[kGateBlock];
    values_ahead(row.gate, row.noise, row.logits_dtype, at(row.logits, start, row.logits_dtype), row.first + start,
                 count, z, slope, ahead);
    const void* const grads = at(grad, start, row.dtype);
    if (grad_weight != nullptr) {
      gate_multiply(row.dtype, grads, wide, z, count, at(grad_weight, start, row.dtype));
    }
    if (grad_logits != nullptr) {
      gate_slopes(row.dtype, grads, at(row.weight, start, row.dtype), wide, slope, count, row.logits_dtype,
                  at(grad_logits, start, row.logits_dtype));
    }
  });
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
