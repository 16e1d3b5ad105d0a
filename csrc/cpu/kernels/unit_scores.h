// Sums (or maxima) of |x|^p along one dimension of a contiguous run [count][rows][behind], in float64, in the order
// of unit_order.h. Reads each element once.
#pragma once

#include <cstdint>

#include "../../dtype.h"
#include "../../unit_order.h"
#include "../../unit_term.h"
#include "capability_namespace.h"

// out[i][j] = sum over r of term(x[i][r][j]), the elements being shared by `lanes` lanes; with more than one lane,
// `behind` is less than kUnitRoom.
//
// write_scores: v rounded to float32 unless `wide`; every NaN is the same one, and no zero is negative.
#define PYPRUNE_DECLARE_UNIT_SCORES                                                                             \
  void sum_units(const void* x, Dtype dtype, const UnitTerm& term, int64_t rows, int64_t behind, int64_t lanes, \
                 int64_t count, double* out);                                                                   \
  void write_scores(const double* v, int64_t count, bool wide, void* out);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_UNIT_SCORES)
