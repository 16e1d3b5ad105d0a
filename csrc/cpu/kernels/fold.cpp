#include "fold.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

template <class T>
void fold_bits(T* __restrict weight, const uint8_t* __restrict mask, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    weight[i] = mask[i] != 0 ? weight[i] : T{0};
  }
}

}  // namespace

void fold_run(void* weight, const uint8_t* mask, Dtype dtype, int64_t count) {
  switch (item_size(dtype)) {
    case 2: return fold_bits(static_cast<uint16_t*>(weight), mask, count);
    case 4: return fold_bits(static_cast<uint32_t*>(weight), mask, count);
    default: return fold_bits(static_cast<uint64_t*>(weight), mask, count);
  }
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
