#include "norms.h"

#include "sum_lanes.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

// Products of two floats are exact in float64, so it makes no difference that they are fused.
#if defined(__AVX512F__)

template <class Type>
double squares_of_block(const typename Type::Item* x) {
  __m512d low = _mm512_setzero_pd(), high = low;
  for (int64_t i = 0; i < kNormBlock; i += kNormLanes) {
    const __m512d a = load8<Type>(x + i), b = load8<Type>(x + i + 8);
    low = _mm512_fmadd_pd(a, a, low);
    high = _mm512_fmadd_pd(b, b, high);
  }
  double lanes[kNormLanes];
  std::memcpy(lanes, &low, sizeof(low));
  std::memcpy(lanes + 8, &high, sizeof(high));
  return add_lanes(lanes);
}

#else

template <class Type>
double squares_of_block(const typename Type::Item* x) {
  return sum_lanes<Type>(x, kNormBlock, [](auto v) { return v * v; });
}

#endif

template <class Type>
void squares(const void* data, int64_t count, double* sums) {
  const auto* x = static_cast<const typename Type::Item*>(data);
  for (; count >= kNormBlock; count -= kNormBlock, x += kNormBlock) {
    *sums++ = squares_of_block<Type>(x);
  }
  if (count > 0) {
    *sums = sum_lanes<Type>(x, count, [](auto v) { return v * v; });
  }
}

}  // namespace

void sum_squares(const void* x, Dtype dtype, int64_t count, double factor, double* sums) {
  switch (dtype) {
    case Dtype::kFloat32: return squares<Float32>(x, count, sums);
    case Dtype::kFloat16: return squares<Float16>(x, count, sums);
    case Dtype::kBFloat16: return squares<BFloat16>(x, count, sums);
    default:
      for (int64_t i = 0; i < count; i += kNormBlock) {
        const int64_t size = count - i < kNormBlock ? count - i : kNormBlock;
        *sums++ = sum_lanes<Float64>(static_cast<const double*>(x) + i, size, [factor](auto v) {
          const auto scaled = v * factor;
          return scaled * scaled;
        });
      }
  }
}

double sum_block(const double* x, int64_t count) {
  return sum_lanes<Float64>(x, count, [](auto v) { return v; });
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
