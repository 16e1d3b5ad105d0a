// Sums of squares of a list of weights: block by block in any order, then added in the order of norm_order.h.
#pragma once

#include <cstddef>
#include <vector>

#include "../norm_order.h"
#include "strided.h"

namespace pyprune {

class NormBlocks {
 public:
  explicit NormBlocks(const std::vector<Strided>& weights);

  // Sums the squares of factor * x over a run of a weight, which lies at `data`: whole blocks, or all up to its end.
  void add(const Chunk& run, const void* data, double factor = 1.0);
  // Where a sweep over the run is to put them.
  double* room(const Chunk& run) { return sums_[run.tensor].data() + run.start / kNormBlock; }
  // What the blocks that begin in a run sum up to, roughly.
  double of_run(const Chunk& run) const;
  // The sum of squares of a weight, all of whose blocks were added.
  double of_weight(size_t tensor) const;

 private:
  std::vector<Dtype> dtypes_;
  std::vector<std::vector<double>> sums_;  // per weight and block
};

}  // namespace pyprune
