#include "unit_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "wide.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

// --- what is done with an element: Terms, and how terms come together: Sum, Maximum. For vectors and single ones.

template <class V>
inline V magnitude(V v) {
  if constexpr (sizeof(V) == sizeof(double)) {
    return std::fabs(v);
  } else {
    typedef int64_t Bits __attribute__((vector_size(sizeof(V))));
    return std::bit_cast<V>(std::bit_cast<Bits>(v) & std::numeric_limits<int64_t>::max());
  }
}

struct Signed {
  template <class V>
  V operator()(V v) const {
    return v;
  }
};
struct Magnitude {
  template <class V>
  V operator()(V v) const {
    return magnitude(v);
  }
};
struct Square {
  template <class V>
  V operator()(V v) const {
    return v * v;
  }
};
struct Power {
  double p;
  double operator()(double v) const { return std::pow(std::fabs(v), p); }
  template <class V>
  [[gnu::noinline]] V operator()(V v) const {  // many calls of pow: one more costs nothing
    for (size_t i = 0; i < sizeof(V) / sizeof(double); ++i) {
      v[i] = (*this)(v[i]);
    }
    return v;
  }
};

struct Sum {
  static constexpr double kNothing = 0;
  template <class V>
  static V join(V a, V b) {
    return a + b;
  }
};
struct Maximum {
  static constexpr double kNothing = -std::numeric_limits<double>::infinity();
  template <class V>
  static V join(V a, V b) {  // NaN if either is
    return (b > a) | (b != b) ? b : a;
  }
};

template <class Join>
inline Wide nothing() {
  return Wide{} + Join::kNothing;
}

// --- the loops

// acc[j] = join(acc[j], term(x[r * n + j])) for r in order, where kRows, if not 0, is how many rows there are. acc
// need not be set if `fresh`.
template <class Type, class Term, class Join, int kVectors, int kRows>
inline void add_strip(const typename Type::Item* x, int64_t rows, int64_t n, bool fresh, const Term& term,
                      double* acc) {
  Wide sums[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    sums[v] = fresh ? nothing<Join>() : load<Wide>(acc + v * kWide);
  }
  for (int64_t r = 0; r < (kRows > 0 ? kRows : rows); ++r, x += n) {
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = Join::join(sums[v], term(load_wide<Type>(x + v * kWide)));
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    std::memcpy(acc + v * kWide, &sums[v], sizeof(Wide));
  }
}

// Short rows side by side look like no stream to the processor: what comes after them, `group` bytes, is fetched by
// hand, into the first-level cache if it is large enough.
inline void fetch(const char* next, size_t bytes, size_t group) {
  for (size_t i = 0; i < bytes; i += 64) {
    if (group <= 8192) {
      __builtin_prefetch(next + i, 0, 3);
    } else {
      __builtin_prefetch(next + i, 0, 2);
    }
  }
}

template <class Type, class Term, class Join, int kRows>
inline void add_columns(const typename Type::Item* x, int64_t rows, int64_t n, bool fresh, const Term& term,
                        double* acc) {
  constexpr int kStrip = 16 / kWide;
  int64_t j = 0;
  for (; j + 16 <= n; j += 16) {
    if constexpr (kRows > 0) {
      fetch(reinterpret_cast<const char*>(x + kRows * (n + j)), kRows * 16 * sizeof(*x), kRows * n * sizeof(*x));
    }
    add_strip<Type, Term, Join, kStrip, kRows>(x + j, rows, n, fresh, term, acc + j);
  }
  for (; j + kWide <= n; j += kWide) {
    add_strip<Type, Term, Join, 1, kRows>(x + j, rows, n, fresh, term, acc + j);
  }
  for (; j < n; ++j) {
    double sum = fresh ? Join::kNothing : acc[j];
    for (int64_t r = 0; r < rows; ++r) {
      sum = Join::join(sum, term(Type::load1(x + r * n + j)));
    }
    acc[j] = sum;
  }
}

// Long rows are read a few at a time, from one end to the other, as memory likes it; short ones all together.
template <class Type, class Term, class Join>
void add_rows(const typename Type::Item* x, int64_t rows, int64_t n, bool fresh, const Term& term, double* acc) {
  constexpr int64_t kGroup = 4;
  if (n > 64) {
    for (; rows >= kGroup; rows -= kGroup, x += kGroup * n, fresh = false) {
      add_columns<Type, Term, Join, kGroup>(x, kGroup, n, fresh, term, acc);
    }
  }
  if (rows > 0 || fresh) {
    add_columns<Type, Term, Join, 0>(x, rows, n, fresh, term, acc);
  }
}

// Sixteen lanes, each with `behind` accumulators, side by side as the elements are.
template <class Type, class Term, class Join>
void add_by_lanes(const typename Type::Item* x, int64_t rows, int64_t behind, const Term& term, double* out) {
  double lanes[kUnitLanes * kUnitRoom];
  const int64_t n = kUnitLanes * behind, steps = rows / kUnitLanes, left = rows % kUnitLanes * behind;
  add_rows<Type, Term, Join>(x, steps, n, true, term, lanes);
  add_rows<Type, Term, Join>(x + steps * n, 1, left, false, term, lanes);
  for (int64_t half = n / 2; half > behind; half /= 2) {
    for (int64_t j = 0; j < half; ++j) {
      lanes[j] = Join::join(lanes[j], lanes[half + j]);
    }
  }
  for (int64_t j = 0; j < behind; ++j) {
    out[j] = Join::join(lanes[j], lanes[behind + j]);
  }
}

// Runs of `rows` neighbours, several at a time, so that no sum waits for the one before.
template <class Type, class Term, class Join>
void add_runs(const typename Type::Item* x, int64_t rows, int64_t count, const Term& term, double* out) {
  if (rows == 4) {  // four runs are turned into four vectors of their first, second, ... elements
    for (; count >= 4; count -= 4, x += 16, out += 4) {
      const Double4 a = Type::load4(x), b = Type::load4(x + 4), c = Type::load4(x + 8), d = Type::load4(x + 12);
      const Double4 ab_even = __builtin_shufflevector(a, b, 0, 4, 2, 6),
                    ab_odd = __builtin_shufflevector(a, b, 1, 5, 3, 7);
      const Double4 cd_even = __builtin_shufflevector(c, d, 0, 4, 2, 6),
                    cd_odd = __builtin_shufflevector(c, d, 1, 5, 3, 7);
      const Double4 elements[4] = {
          __builtin_shufflevector(ab_even, cd_even, 0, 1, 4, 5), __builtin_shufflevector(ab_odd, cd_odd, 0, 1, 4, 5),
          __builtin_shufflevector(ab_even, cd_even, 2, 3, 6, 7), __builtin_shufflevector(ab_odd, cd_odd, 2, 3, 6, 7)};
      Double4 sums = Double4{} + Join::kNothing;
      for (const Double4& element : elements) {
        sums = Join::join(sums, term(element));
      }
      std::memcpy(out, &sums, sizeof(sums));
    }
  }
  constexpr int kTogether = 8;
  for (; count >= kTogether; count -= kTogether, x += kTogether * rows, out += kTogether) {
    double sums[kTogether];
    std::fill_n(sums, kTogether, Join::kNothing);
    for (int64_t r = 0; r < rows; ++r) {
      for (int i = 0; i < kTogether; ++i) {
        sums[i] = Join::join(sums[i], term(Type::load1(x + i * rows + r)));
      }
    }
    std::copy_n(sums, kTogether, out);
  }
  for (; count > 0; --count, x += rows, ++out) {
    *out = Join::kNothing;
    for (int64_t r = 0; r < rows; ++r) {
      *out = Join::join(*out, term(Type::load1(x + r)));
    }
  }
}

template <class Type, class Join, class Term>
void sum_all(const void* data, int64_t rows, int64_t behind, int64_t lanes, int64_t count, const Term& term,
             double* out) {
  const auto* x = static_cast<const typename Type::Item*>(data);
  if (rows == 1) {
    behind *= count;
    count = 1;
    lanes = 1;
  }
  if (lanes == 1 && behind == 1) {
    return add_runs<Type, Term, Join>(x, rows, count, term, out);
  }
  for (int64_t i = 0; i < count; ++i, x += rows * behind, out += behind) {
    if (lanes > 1) {
      add_by_lanes<Type, Term, Join>(x, rows, behind, term, out);
    } else {
      add_rows<Type, Term, Join>(x, rows, behind, true, term, out);
    }
  }
}

template <class Type>
void with_term(const void* x, const UnitTerm& term, int64_t rows, int64_t behind, int64_t lanes, int64_t count,
               double* out) {
  if (term.maximum) {
    return term.power == UnitPower::kSigned ? sum_all<Type, Maximum>(x, rows, behind, lanes, count, Signed(), out)
                                            : sum_all<Type, Maximum>(x, rows, behind, lanes, count, Magnitude(), out);
  }
  switch (term.power) {
    case UnitPower::kSigned: return sum_all<Type, Sum>(x, rows, behind, lanes, count, Signed(), out);
    case UnitPower::kMagnitude: return sum_all<Type, Sum>(x, rows, behind, lanes, count, Magnitude(), out);
    case UnitPower::kSquare: return sum_all<Type, Sum>(x, rows, behind, lanes, count, Square(), out);
    default: return sum_all<Type, Sum>(x, rows, behind, lanes, count, Power{term.p}, out);
  }
}

template <class Out>
void write_as(const double* __restrict v, int64_t count, Out* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    const Out score = static_cast<Out>(v[i]) + Out{0};
    out[i] = score != score ? std::numeric_limits<Out>::quiet_NaN() : score;
  }
}

}  // namespace

void sum_units(const void* x, Dtype dtype, const UnitTerm& term, int64_t rows, int64_t behind, int64_t lanes,
               int64_t count, double* out) {
  switch (dtype) {
    case Dtype::kFloat32: return with_term<Float32>(x, term, rows, behind, lanes, count, out);
    case Dtype::kFloat64: return with_term<Float64>(x, term, rows, behind, lanes, count, out);
    case Dtype::kFloat16: return with_term<Float16>(x, term, rows, behind, lanes, count, out);
    case Dtype::kBFloat16: return with_term<BFloat16>(x, term, rows, behind, lanes, count, out);
    case Dtype::kBool:
      return term.maximum ? sum_all<Bool, Maximum>(x, rows, behind, lanes, count, Signed(), out)
                          : sum_all<Bool, Sum>(x, rows, behind, lanes, count, Signed(), out);
  }
}

void write_scores(const double* v, int64_t count, bool wide, void* out) {
  if (wide) {
    write_as(v, count, static_cast<double*>(out));
  } else {
    write_as(v, count, static_cast<float*>(out));
  }
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
