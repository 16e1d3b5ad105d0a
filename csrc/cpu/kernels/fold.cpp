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

template <class T>
void clear_bits(void* weight, const uint8_t* mask, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T) * 2;
  T* const w = static_cast<T*>(weight);
  int64_t i = 0;
  for (; i + kLine <= count; i += kLine) {
    T strays = 0;
    for (int64_t j = 0; j < kLine; ++j) {
      strays |= mask[i + j] != 0 ? T{0} : w[i + j];
    }
    if (strays != 0) {
      fold_bits<T>(w + i, mask + i, w + i, kLine);
    }
  }
  fold_bits<T>(w + i, mask + i, w + i, count - i);
}

}  // namespace

void fold_run(const void* weight, const uint8_t* mask, void* out, Dtype dtype, int64_t count) {
  switch (item_size(dtype)) {
    case 2: return fold_bits<uint16_t>(weight, mask, out, count);
    case 4: return fold_bits<uint32_t>(weight, mask, out, count);
    default: return fold_bits<uint64_t>(weight, mask, out, count);
  }
}

void clear_run(void* weight, const uint8_t* mask, Dtype dtype, int64_t count) {
  switch (item_size(dtype)) {
    case 2: return clear_bits<uint16_t>(weight, mask, count);
    case 4: return clear_bits<uint32_t>(weight, mask, count);
    default: return clear_bits<uint64_t>(weight, mask, count);
  }
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
