#include "probe.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

// All ones where the mask drops. As an integer that is and-ed: what g++ 12 makes of a choice between 0 and 64 bits,
// added up in vectors, is wrong.
template <class T>
T dropped(uint8_t mask) {
  return static_cast<T>(static_cast<T>(mask != 0) - 1);
}

template <class T>
bool any_bits(const void* weight, const uint8_t* mask, int64_t count) {
  const T* const w = static_cast<const T*>(weight);
  T strays = 0;
  for (int64_t i = 0; i < count; ++i) {
    strays |= w[i] & dropped<T>(mask[i]);
  }
  return strays != 0;
}

}  // namespace

bool has_stray(const void* weight, const uint8_t* mask, Dtype dtype, int64_t count) {
  switch (item_size(dtype)) {
    case 2: return any_bits<uint16_t>(weight, mask, count);
    case 4: return any_bits<uint32_t>(weight, mask, count);
    default: return any_bits<uint64_t>(weight, mask, count);
  }
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
