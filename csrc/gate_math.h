// What a gate is: one keep-predicate and one hard-concrete formula for forward and backward, CPU and GPU.
//
// Written with +, -, *, / and square roots alone, each rounded as IEEE 754 says and none fused, so every build that
// keeps to that (no fast-math, no contraction) finds the same bits, and forward and backward cannot disagree. Real is
// float, or double for float64 logits. The price is fused multiply-adds. The exponential is off by up to (2 + |x| /
// 2) units in the last place, a tenth of the grain of the noise where decisions are made: about 1 in 30 million
// sampled decisions differs from float64.
//
// No logarithm of the noise: sigma(m + logit(u)) > 1/2 is e^m u > 1 - u, and its slope comes from the same two
// numbers. With the usual temperature of 2/3, hard concrete needs a square root more; other temperatures take the
// logarithm. The backward pass draws the noise (philox.h) again instead of keeping it.
#pragma once

#include <cmath>
#include <type_traits>

#include "philox.h"

namespace pyprune {

enum class GateRule : int8_t { kBernoulli, kHardConcrete, kStraightThrough };

// The parameters of a gate; beta, gamma and zeta are those of Louizos et al. 2018.
struct Gate {
  GateRule rule;
  bool sampled;  // or deterministic, as at test time
  double beta;
  double gamma;
  double zeta;
};

// With a temperature of 2/3 the power 1 / beta is x * sqrt(x), and no logarithm is needed.
constexpr double kUsualBeta = 2.0 / 3.0;

namespace {

// What is known when a kernel is compiled.
template <GateRule kRule_, bool kSampled_, bool kUsual_>
struct GateKind {
  static constexpr GateRule kRule = kRule_;
  static constexpr bool kSampled = kSampled_;
  static constexpr bool kUsual = kUsual_;
};

// Calls use(GateKind) for this gate.
template <class Use>
void with_gate_kind(const Gate& gate, const Use& use) {
  const auto with_rule = [&]<GateRule kRule>(std::integral_constant<GateRule, kRule>) {
    if (!gate.sampled) {
      use(GateKind<kRule, false, true>{});
    } else if (kRule == GateRule::kBernoulli || gate.beta == kUsualBeta) {
      use(GateKind<kRule, true, true>{});
    } else if constexpr (kRule != GateRule::kBernoulli) {
      use(GateKind<kRule, true, false>{});
    }
  };
  switch (gate.rule) {
    case GateRule::kBernoulli: return with_rule(std::integral_constant<GateRule, GateRule::kBernoulli>{});
    case GateRule::kHardConcrete: return with_rule(std::integral_constant<GateRule, GateRule::kHardConcrete>{});
    default: return with_rule(std::integral_constant<GateRule, GateRule::kStraightThrough>{});
  }
}

template <class Real>
using BitsOf = std::conditional_t<sizeof(Real) == 4, uint32_t, uint64_t>;
template <class Real>
constexpr int kMantissaBits = sizeof(Real) == 4 ? 23 : 52;
template <class Real>
constexpr int kExponentBias = sizeof(Real) == 4 ? 127 : 1023;

// To -40 to 40; NaN stays NaN. Beyond, a logit decides alone, as the noise adds at most log(2^24) = 16.6.
template <class Real>
PYPRUNE_HOST_DEVICE inline Real within_range(Real x) {
  x = Real(-40) > x ? Real(-40) : x;
  return Real(40) < x ? Real(40) : x;
}

// log(2)^k / k!
template <class Real>
PYPRUNE_HOST_DEVICE constexpr Real power_coefficient(int k) {
  double product = 1;
  for (int i = 1; i <= k; ++i) {
    product *= 0.6931471805599453 / i;
  }
  return static_cast<Real>(product);
}

// Sum of x^k log(2)^k / k! from `k` on, by Horner's rule.
template <class Real, int kDegree, int k = 0>
PYPRUNE_HOST_DEVICE inline Real power_series(Real x) {
  constexpr Real coefficient = power_coefficient<Real>(k);
  if constexpr (k == kDegree) {
    return coefficient;
  } else {
    return power_series<Real, kDegree, k + 1>(x) * x + coefficient;
  }
}

// e^x for |x| <= 40, as 2^n 2^f with |f| <= 1/2. In float the relative error stays below (2 + |x| / 2) * 2^-23.
template <class Real>
PYPRUNE_HOST_DEVICE inline Real exponential(Real x) {
  constexpr bool kFloat = sizeof(Real) == 4;
  constexpr Real kRounder = kFloat ? 0x1.8p23 : 0x1.8p52;  // adding it leaves the nearest integer in the low bits
  const Real y = x * Real(1.4426950408889634);
  const Real rounded = y + kRounder;
  const Real f = y - (rounded - kRounder);
  const BitsOf<Real> exponent = __builtin_bit_cast(BitsOf<Real>, rounded) + kExponentBias<Real>;
  return power_series<Real, kFloat ? 6 : 13>(f) * __builtin_bit_cast(Real, exponent << kMantissaBits<Real>);
}

// Sum of x^k / (2 k + 1) from `k` on.
template <class Real, int kDegree, int k = 0>
PYPRUNE_HOST_DEVICE inline Real artanh_series(Real x) {
  constexpr Real coefficient = static_cast<Real>(1.0 / (2 * k + 1));
  if constexpr (k == kDegree) {
    return coefficient;
  } else {
    return artanh_series<Real, kDegree, k + 1>(x) * x + coefficient;
  }
}

// log(x) of a positive normal number, as n log(2) + 2 artanh((m - 1) / (m + 1)) with m in [sqrt(1/2), sqrt(2)).
template <class Real>
PYPRUNE_HOST_DEVICE inline Real logarithm(Real x) {
  using Signed = std::make_signed_t<BitsOf<Real>>;
  constexpr Signed kRootHalf = sizeof(Real) == 4 ? 0x3f3504f3 : 0x3fe6a09e667f3bcd;
  const Signed bits = __builtin_bit_cast(Signed, x);
  const Signed n = (bits - kRootHalf) >> kMantissaBits<Real>;
  const Real m = __builtin_bit_cast(Real, bits - (n << kMantissaBits<Real>));
  const Real f = (m - Real(1)) / (m + Real(1));
  return artanh_series<Real, sizeof(Real) == 4 ? 4 : 10>(f * f) * (f + f) +
         static_cast<Real>(n) * Real(0.6931471805599453);
}

PYPRUNE_HOST_DEVICE inline float square_root(float x) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}
PYPRUNE_HOST_DEVICE inline double square_root(double x) {
#ifdef __CUDA_ARCH__
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

template <class Real>
struct GateValue {
  Real z;      // the factor on the weight
  Real slope;  // dz / dlogit
};

// A probability t / (t + v), and 1 minus it.
template <class Real>
struct Odds {
  Real one;
  Real other;
  PYPRUNE_HOST_DEVICE Odds(Real t, Real v) {
    const Real inverse = Real(1) / (t + v);
    one = t * inverse;
    other = v * inverse;
  }
};

// `word` holds the noise of a sampled gate.
template <class Real, class Kind>
PYPRUNE_HOST_DEVICE inline GateValue<Real> gate_value(Kind, const Gate& gate, Real logit, uint32_t word) {
  const Real u = Kind::kSampled ? uniform<Real>(word) : Real(0.5);
  // Odds of logit + log(u / (1 - u)), as a ratio without a logarithm.
  Real t = exponential(within_range(logit)) * u;
  Real v = Real(1) - u;
  if constexpr (Kind::kRule == GateRule::kBernoulli) {
    const Odds<Real> p(t, v);
    const bool keep = Kind::kSampled ? t > v : logit > Real(0);
    return {keep ? Real(1) : Real(0), p.one * p.other};
  } else {
    if constexpr (Kind::kSampled && Kind::kUsual) {
      // The odds to the power of 3/2, both times sqrt(v): one root instead of two.
      t = t * square_root(t * v);
      v = v * v;
    } else if constexpr (Kind::kSampled) {
      t = exponential(within_range((logit + logarithm(u / v)) / static_cast<Real>(gate.beta)));
      v = Real(1);
    }
    const Odds<Real> s(t, v);
    const Real gamma = static_cast<Real>(gate.gamma);
    const Real width = static_cast<Real>(gate.zeta - gate.gamma);
    const Real stretched = s.one * width + gamma;
    const bool inside = stretched > Real(0) && stretched < Real(1);
    const Real steepness = Kind::kSampled ? width / static_cast<Real>(gate.beta) : width;
    const Real slope = inside ? s.one * s.other * steepness : Real(0);
    if constexpr (Kind::kRule == GateRule::kStraightThrough) {
      return {stretched > Real(0) ? Real(1) : Real(0), slope};
    } else {
      const Real above = stretched < Real(0) ? Real(0) : stretched;
      return {above > Real(1) ? Real(1) : above, slope};
    }
  }
}

}  // namespace
}  // namespace pyprune
