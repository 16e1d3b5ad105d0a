#include "expand.h"

#include <cstring>

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

// Blocks as wide as an integer: a product repeats the byte.
template <class Word>
void repeat_words(const uint8_t* units, int64_t stride, int64_t count, uint8_t* out) {
  constexpr Word kEachByte = static_cast<Word>(~Word{0}) / 0xff;
  for (int64_t i = 0; i < count; ++i) {
    const Word word = static_cast<Word>(units[i * stride] * kEachByte);
    std::memcpy(out + i * sizeof(Word), &word, sizeof(Word));
  }
}

}  // namespace

void repeat_units(const uint8_t* units, int64_t stride, int64_t count, int64_t block, uint8_t* out) {
  switch (block) {
    case 1:
      if (stride == 1) {
        std::memcpy(out, units, count);
        return;
      }
      return repeat_words<uint8_t>(units, stride, count, out);
    case 2: return repeat_words<uint16_t>(units, stride, count, out);
    case 4: return repeat_words<uint32_t>(units, stride, count, out);
    case 8: return repeat_words<uint64_t>(units, stride, count, out);
    default:
      // Short blocks are written with one store, which the next block overwrites in part, while it stays in the row.
      int64_t i = 0;
      for (; block <= 16 && (count - i) * block >= 16; ++i, out += block) {
        std::memset(out, units[i * stride], 16);
      }
      for (; i < count; ++i, out += block) {
        std::memset(out, units[i * stride], block);
      }
  }
}

void repeat_rows(const uint8_t* units, int64_t stride, int64_t count, int64_t row, int64_t times, uint8_t* out) {
  int64_t left = count * times * row;
  for (; count > 0; --count, units += stride) {
    uint8_t once[16] = {};
    std::memcpy(once, units, row);
    for (int64_t i = 0; i < times; ++i, out += row, left -= row) {
      std::memcpy(out, once, left >= 16 ? 16 : row);
    }
  }
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
