// The mask of each element of a tensor whose units have masks: written piece by piece, never stored as a whole.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "strided.h"

namespace pyprune {

class UnitPattern {
 public:
  // Elements are numbered as they lie in memory if the tensor is dense (and is then viewed as flat), else in C order.
  UnitPattern(Strided& tensor, const int64_t* sizes, const int64_t* strides, const int64_t* block, int64_t dims,
              const uint8_t* units, const int64_t* unit_strides);

  // The masks of elements [start, start + count).
  void write(int64_t start, int64_t count, uint8_t* out) const;

  // Whether neighbours mostly share a unit.
  bool has_long_runs() const { return dims_.back().block >= kLongRun; }
  // Calls visit(first, count) for runs of those elements in units that are not kept.
  template <class Visit>
  void for_each_dropped_run(int64_t start, int64_t count, const Visit& visit) const {
    const Dim& inner = dims_.back();
    for (const int64_t end = start + count; start < end;) {
      const int64_t place = start % inner.size, in_unit = place % inner.block;
      const int64_t run = std::min({inner.block - in_unit, inner.size - place, end - start});
      if (units_[row_of(start) + place / inner.block * inner.unit_stride] == 0) {
        visit(start, run);
      }
      start += run;
    }
  }

 private:
  struct Dim {
    int64_t size, block, unit_stride;
  };
  static constexpr int64_t kLongRun = 64, kShortRow = 16;

  void add(const Dim& dim);
  int64_t row_of(int64_t element) const;
  int64_t copy_from_before(int64_t element, int64_t done, int64_t left, uint8_t* out) const;
  int64_t write_short_rows(int64_t element, int64_t left, uint8_t* out) const;
  void write_row(const uint8_t* units, int64_t start, int64_t count, uint8_t* out) const;

  const uint8_t* units_;
  std::vector<Dim> dims_;        // outermost first; neighbours that can be walked as one are merged
  std::vector<int64_t> behind_;  // elements of the later ones
};

}  // namespace pyprune
