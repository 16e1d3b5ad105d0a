#include "gate_penalty.h"

#include <algorithm>

#include "rows.h"
#include "sum_lanes.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

constexpr int64_t kBlock = 1024;

template <class Real>
double sum_block(const Real* __restrict logits, bool hard, Real shift, int64_t count) {
  if (hard) {
    int32_t open = 0;
    for (int64_t i = 0; i < count; ++i) {
      open += logits[i] > 0;
    }
    return open;
  }
  Real p[kBlock];
  for (int64_t i = 0; i < count; ++i) {
    p[i] = Odds<Real>(exponential(within_range(logits[i] + shift)), Real(1)).one;
  }
  using Type = std::conditional_t<std::is_same_v<Real, float>, Float32, Float64>;
  return sum_lanes<Type>(p, count, [](auto v) { return v; });
}

template <class Real>
void slopes(const Real* __restrict logits, Real shift, double grad, int64_t count, Real* __restrict out) {
  const Real factor = static_cast<Real>(grad);
  for (int64_t i = 0; i < count; ++i) {
    const Odds<Real> p(exponential(within_range(logits[i] + shift)), Real(1));
    out[i] = factor * (p.one * p.other);
  }
}

// Calls visit(pointer, count) for blocks of a row of logits.
template <class Visit>
void for_each_block(Dtype dtype, const void* logits, int64_t count, const Visit& visit) {
  for (int64_t start = 0; start < count; start += kBlock) {
    visit(static_cast<const char*>(logits) + start * item_size(dtype), start, std::min(kBlock, count - start));
  }
}

}  // namespace

double penalty_sum(Dtype dtype, const void* logits, bool hard, double shift, int64_t count) {
  double total = 0;
  for_each_block(dtype, logits, count, [&](const void* block, int64_t, int64_t size) {
    if (dtype == Dtype::kFloat64) {
      total += sum_block(static_cast<const double*>(block), hard, shift, size);
    } else {
      float room[kBlock];
      total += sum_block(widened(dtype, block, size, room), hard, static_cast<float>(shift), size);
    }
  });
  return total;
}

void penalty_slopes(Dtype dtype, const void* logits, double shift, double grad, int64_t count, void* out) {
  for_each_block(dtype, logits, count, [&](const void* block, int64_t start, int64_t size) {
    void* const target = static_cast<char*>(out) + start * item_size(dtype);
    if (dtype == Dtype::kFloat64) {
      slopes(static_cast<const double*>(block), shift, grad, size, static_cast<double*>(target));
    } else {
      float room[kBlock], values[kBlock];
      slopes(widened(dtype, block, size, room), static_cast<float>(shift), grad, size,
             dtype == Dtype::kFloat32 ? static_cast<float*>(target) : values);
      narrow(dtype, values, size, target);
    }
  });
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
