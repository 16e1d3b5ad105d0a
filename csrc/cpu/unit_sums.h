// Scores of the units of one tensor, part by part, in the order of unit_order.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../unit_dims.h"
#include "../unit_term.h"
#include "strided.h"

namespace pyprune {

class UnitSums {
 public:
  // What a thread keeps from one task to the next.
  struct Rooms {
    Room copied;
    std::vector<double> sums, next;
  };

  // Scores go to `out`, as float64 if `wide` and as float32 otherwise.
  UnitSums(const Strided& tensor, const UnitDims& dims, const UnitTerm& term, bool mean, bool wide, void* out);

  // Parts can be added in any order, by any threads.
  int64_t parts() const { return parts_; }
  int64_t elements_of_part() const { return elements_of_part_; }
  void add(int64_t first, int64_t count, Rooms& rooms);
  // After that, units that were cut into pieces are finished one by one.
  int64_t unfinished() const { return pieces_.empty() ? 0 : tiles_; }
  void finish(int64_t tile, Rooms& rooms) const;

 private:
  void see_as_it_lies(const UnitDims& dims, size_t first);
  int64_t rows_of(int64_t tile) const;
  void write(int64_t tile, int64_t count, int64_t units, Rooms& rooms) const;
  void divide_by_counts(int64_t tile, std::vector<double>& scores, int64_t count) const;

  Strided tensor_;  // flat if it is dense
  UnitTerm term_;
  bool mean_, wide_;
  char* out_;

  UnitDim rows_;                // the first dimension that is summed, taken together with those before it if it can
  std::vector<UnitDim> later_;  // those after it
  std::vector<size_t> in_memory_;    // how rows_ (0) and later_ (1, ...) are nested in memory, outermost first
  int64_t outer_, behind_, inside_;  // elements of the dimensions before rows_, after it, inside it in memory
  int64_t tiles_;                    // blocks of rows
  int64_t scores_of_tile_ = 1;
  int64_t pieces_of_tile_, rows_of_piece_;
  int64_t parts_, elements_of_part_;
  std::vector<double> pieces_;  // their sums
};

}  // namespace pyprune
