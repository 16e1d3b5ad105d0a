// A tensor as unit_order.h sees it, for the hosts of CPU and CUDA kernels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pyprune {

// A dimension of a tensor cut into units; in memory, its elements are `stride` apart.
struct UnitDim {
  int64_t size;
  int64_t block;
  int64_t stride;
  int64_t units() const { return (size + block - 1) / block; }
};

// The dimensions in which units are summed: those of size one are dropped, and from the third one on, neighbours that
// the block covers are one (if they do not lie so in memory, `as_they_lie` is false).
struct UnitDims {
  std::vector<UnitDim> dims;
  bool as_they_lie = true;

  UnitDims(const int64_t* sizes, const int64_t* strides, const int64_t* block, int64_t count) {
    bool kernel = false;  // the last one may be joined
    for (int64_t d = 0; d < count; ++d) {
      if (sizes[d] == 1) {
        continue;
      }
      const bool covered = d >= 2 && block[d] >= sizes[d];
      if (kernel && covered) {
        as_they_lie = as_they_lie && dims.back().stride == sizes[d] * strides[d];
        const int64_t size = dims.back().size * sizes[d];
        dims.back() = {size, std::max<int64_t>(size, 1), strides[d]};
      } else {
        dims.push_back({sizes[d], std::min(block[d], std::max<int64_t>(sizes[d], 1)), strides[d]});
      }
      kernel = covered;
    }
    if (dims.empty()) {
      dims.push_back({1, 1, 1});
    }
  }

  // The first one along which units have several elements; the last one if there is none.
  size_t first_summed() const {
    size_t d = 0;
    while (d + 1 < dims.size() && dims[d].block == 1) {
      ++d;
    }
    return d;
  }
  int64_t elements_behind(size_t dim) const {
    int64_t product = 1;
    for (size_t d = dim + 1; d < dims.size(); ++d) {
      product *= dims[d].size;
    }
    return product;
  }
};

}  // namespace pyprune
