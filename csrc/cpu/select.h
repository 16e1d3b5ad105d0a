// Masks of the k smallest scores over a list of weights: the algorithm of the threshold operator, without torch.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "strided.h"

namespace pyprune {

// One set of weights that compete: scores |w| * scale are compared in float32, or in float64 if `wide`.
struct Competition {
  std::vector<Strided> weights;
  std::vector<Strided> masks;
  std::vector<std::optional<Strided>> bases;  // what one lacks goes before all others; empty, or without one: nothing
  std::vector<double> scales;                 // empty: the score is |w|
  bool normalize = false;                     // the score is |w| / ||w||_2; there are no scales, and nothing is wide
  bool wide = false;
  int64_t removed = 0;
};

// Writes the masks and returns the number of non-finite elements of each weight.
std::vector<int64_t> select_masks(const Competition& competition);

}  // namespace pyprune
