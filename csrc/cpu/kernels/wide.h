// As many elements as a vector register holds in float64, for each element type.
#pragma once

#include "sum_lanes.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

#if defined(__AVX512F__)

typedef double Wide __attribute__((vector_size(64)));
typedef int64_t WideInt __attribute__((vector_size(64)));

template <class Type>
inline Wide load_wide(const typename Type::Item* x) {
  return load8<Type>(x);
}

#else

typedef Double4 Wide;
typedef int64_t WideInt __attribute__((vector_size(32)));

template <class Type>
inline Wide load_wide(const typename Type::Item* x) {
  return Type::load4(x);
}

#endif

constexpr int64_t kWide = sizeof(Wide) / sizeof(double);

}  // namespace
}  // namespace pyprune::PYPRUNE_CAPABILITY
