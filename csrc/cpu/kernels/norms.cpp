#include "norms.h"

#include "sum_lanes.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

template <class Type>
double squares(const void* x, int64_t count) {
  return sum_lanes<Type>(static_cast<const typename Type::Item*>(x), count, [](auto v) { return v * v; });
}

}  // namespace

double sum_squares(const void* x, Dtype dtype, int64_t count, double factor) {
  switch (dtype) {
    case Dtype::kFloat32: return squares<Float32>(x, count);
    case Dtype::kFloat16: return squares<Float16>(x, count);
    case Dtype::kBFloat16: return squares<BFloat16>(x, count);
    default:
      return sum_lanes<Float64>(static_cast<const double*>(x), count, [factor](auto v) {
        const auto scaled = v * factor;
        return scaled * scaled;
      });
  }
}

double sum_block(const double* x, int64_t count) {
  return sum_lanes<Float64>(x, count, [](auto v) { return v; });
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
