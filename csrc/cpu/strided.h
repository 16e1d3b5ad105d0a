// A tensor without torch: pointer, dtype, sizes and strides. Kernels see contiguous runs; what is not contiguous is
// copied run by run through a small buffer, in the order of the flat (C order) index, so that ties and norms do not
// depend on the layout: eight columns at a time, because a power of two between neighbours maps them all to one set
// of the cache.
#pragma once

#include <cstdint>
#include <vector>

#include "../dtype.h"

namespace pyprune {

// Memory for a copied run, 8 bytes per element: enough for the widest dtype.
using Room = std::vector<uint64_t>;

struct Strided {
  Strided(void* data, Dtype dtype, const int64_t* sizes, const int64_t* strides, int64_t dims);

  bool contiguous() const { return sizes.empty() || (sizes.size() == 1 && strides[0] == 1); }
  int64_t offset(int64_t flat) const;  // where the element with this flat index lies, in elements
  char* at(int64_t flat) const { return data + offset(flat) * item_size(dtype); }
  // Elements [start, start + count) one after the other: where they lie, or copied into `room`.
  char* in_a_row(int64_t start, int64_t count, Room& room) const;
  // Where to write them: in place, or into `room`, from where scatter() puts them into place.
  char* to_write(int64_t start, int64_t count, Room& room) const;
  void gather(int64_t start, int64_t count, void* out) const;
  void scatter(int64_t start, int64_t count, void* in) const;

  char* data;
  Dtype dtype;
  int64_t numel;
  std::vector<int64_t> sizes;  // neighbours that can be walked as one are merged, dimensions of size 1 dropped
  std::vector<int64_t> strides;

 private:
  struct Block;
  template <class Visit>
  void for_each_block(int64_t start, int64_t count, const Visit& visit) const;
  template <class T, class Move>
  void walk(const Block& block, T* run, const Move& move) const;
};

// If all tensors (same shape) are dense and share one order of dimensions, views them as contiguous in that order.
// For work that does not care which element is which, as long as the tensors agree.
bool as_flat(const std::vector<Strided*>& tensors);

// A run of one tensor that a thread works on at a time: small enough for its buffers to stay in cache, and for
// a position in it to fit 16 bits.
constexpr int64_t kChunk = 65536;

struct Chunk {
  int64_t tensor;
  int64_t start;
  int64_t count;
};

std::vector<Chunk> chunks_of(const std::vector<Strided>& tensors);
int64_t elements_of(const std::vector<Strided>& tensors);

}  // namespace pyprune
