// Masks of units become masks of elements chunk by chunk, in cache: within a unit, what lies one step back is copied.
// fold reads that instead of a mask in memory, or, where units are long runs, clears those and leaves the rest
// unread.
#include "unit_pattern.h"

#include <cstring>
#include <numeric>

#include "capability.h"
#include "kernels/expand.h"

namespace pyprune {

UnitPattern::UnitPattern(Strided& tensor, const int64_t* sizes, const int64_t* strides, const int64_t* block,
                         int64_t dims, const uint8_t* units, const int64_t* unit_strides)
    : units_(units) {
  std::vector<int64_t> order(dims);
  std::iota(order.begin(), order.end(), 0);
  if (as_flat({&tensor})) {
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  }
  for (const int64_t d : order) {
    if (sizes[d] != 1) {
      add({sizes[d], std::min(block[d], std::max<int64_t>(1, sizes[d])), unit_strides[d]});
    }
  }
  if (dims_.empty()) {
    dims_.push_back({1, 1, 1});
  }
  behind_.assign(dims_.size(), 1);
  for (size_t d = dims_.size() - 1; d > 0; --d) {
    behind_[d - 1] = behind_[d] * dims_[d].size;
  }
}

void UnitPattern::add(const Dim& dim) {
  if (!dims_.empty()) {
    Dim& outer = dims_.back();
    const int64_t units = dim.size / dim.block;
    if (dim.block == dim.size) {
      outer = {outer.size * dim.size, outer.block * dim.size, outer.unit_stride};
      return;
    }
    if (outer.block == 1 && units * dim.block == dim.size && outer.unit_stride == units * dim.unit_stride) {
      outer = {outer.size * dim.size, dim.block, dim.unit_stride};
      return;
    }
  }
  dims_.push_back(dim);
}

// Where the units of the innermost row with this element begin.
int64_t UnitPattern::row_of(int64_t element) const {
  int64_t offset = 0;
  for (size_t d = 0; d + 1 < dims_.size(); ++d) {
    offset += element / behind_[d] % dims_[d].size / dims_[d].block * dims_[d].unit_stride;
  }
  return offset;
}

void UnitPattern::write(int64_t start, int64_t count, uint8_t* out) const {
  const int64_t inner = dims_.back().size;
  for (int64_t done = 0; done < count;) {
    const int64_t element = start + done, left = count - done;
    int64_t now = copy_from_before(element, done, left, out + done);
    if (now == 0) {
      now = write_short_rows(element, left, out + done);
    }
    if (now == 0) {
      const int64_t place = element % inner;
      now = std::min(inner - place, left);
      write_row(units_ + row_of(element), place, now, out + done);
    }
    done += now;
  }
}

// What lies one step of a dimension back is the same within a unit. Copies it, while it is in the cache, as often as
// it can be from here on; returns how much that was. `done` elements before and `left` from here on have room.
int64_t UnitPattern::copy_from_before(int64_t element, int64_t done, int64_t left, uint8_t* out) const {
  for (size_t d = 0; d + 1 < dims_.size(); ++d) {
    const int64_t step = behind_[d];
    if (element % step == 0 && done >= step && left >= step) {
      const int64_t place = element / step % dims_[d].size, in_unit = place % dims_[d].block;
      if (in_unit > 0) {
        const int64_t times = std::min({dims_[d].block - in_unit, dims_[d].size - place, left / step});
        for (int64_t i = 0; i < times; ++i) {
          std::memcpy(out + i * step, out - step, step);
        }
        return times * step;
      }
    }
  }
  return 0;
}

// The same for the rest of a dimension at once, where its units repeat short rows (a kernel's positions). Returns how
// many elements were written.
int64_t UnitPattern::write_short_rows(int64_t element, int64_t left, uint8_t* out) const {
  const Dim& row = dims_.back();
  if (dims_.size() < 2 || row.block != 1 || row.unit_stride != 1 || row.size > kShortRow) {
    return 0;
  }
  const Dim& dim = dims_[dims_.size() - 2];
  const int64_t place = element / row.size % dim.size, of_unit = dim.block * row.size;
  if (element % row.size != 0 || place % dim.block != 0) {
    return 0;
  }
  const int64_t units = std::min((dim.size - place) / dim.block, left / of_unit);
  PYPRUNE_KERNEL(repeat_rows)(units_ + row_of(element), dim.unit_stride, units, row.size, dim.block, out);
  return units * of_unit;
}

// Elements [start, start + count) of an innermost row.
void UnitPattern::write_row(const uint8_t* units, int64_t start, int64_t count, uint8_t* out) const {
  const Dim& dim = dims_.back();
  const auto repeat = PYPRUNE_KERNEL(repeat_units);
  units += start / dim.block * dim.unit_stride;
  const int64_t in_unit = start % dim.block;
  if (in_unit != 0) {
    const int64_t head = std::min(dim.block - in_unit, count);
    std::memset(out, *units, head);
    units += dim.unit_stride;
    out += head;
    count -= head;
  }
  const int64_t whole = count / dim.block;
  repeat(units, dim.unit_stride, whole, dim.block, out);
  if (count > whole * dim.block) {
    std::memset(out + whole * dim.block, units[whole * dim.unit_stride], count - whole * dim.block);
  }
}

}  // namespace pyprune
