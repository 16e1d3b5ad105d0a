#include "fold.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

template <class T>
void fold_bits(const void* weight, const uint8_t* mask, void* out, int64_t count) {
  const T* const from = static_cast<const T*>(weight);
  T* const to = static_cast<T*>(out);
  // Not __restrict: the two are the same, or have nothing in common.
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    to[i] = mask[i] != 0 ? from[i] : T{0};
  }
}

}  // namespace

void fold_run(const void* weight, const uint8_t* mask, void* out, Dtype dtype, int64_t count) {
  switch (item_size(dtype)) {
    case 2: return fold_bits<uint16_t>(weight, mask, out, count);
    case 4: return fold_bits<uint32_t>(weight, mask, out, count);
    default: return fold_bits<uint64_t>(weight, mask, out, count);
  }
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
