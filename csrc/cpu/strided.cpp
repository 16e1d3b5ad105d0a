#include "strided.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace pyprune {
namespace {

// Element types by size alone: copies do not look inside.
template <class Visit>
void by_size(Dtype dtype, const Visit& visit) {
  switch (item_size(dtype)) {
    case 1: return visit(uint8_t{});
    case 2: return visit(uint16_t{});
    case 4: return visit(uint32_t{});
    default: return visit(uint64_t{});
  }
}

}  // namespace

Strided::Strided(void* data, Dtype dtype, const int64_t* all_sizes, const int64_t* all_strides, int64_t dims)
    : data(static_cast<char*>(data)), dtype(dtype), numel(1) {
  for (int64_t d = 0; d < dims; ++d) {
    numel *= all_sizes[d];
    if (all_sizes[d] == 1) {
      continue;
    }
    if (!sizes.empty() && strides.back() == all_sizes[d] * all_strides[d]) {
      sizes.back() *= all_sizes[d];
      strides.back() = all_strides[d];
    } else {
      sizes.push_back(all_sizes[d]);
      strides.push_back(all_strides[d]);
    }
  }
  if (numel == 0) {
    sizes.assign(1, 0);
    strides.assign(1, 1);
  }
}

int64_t Strided::offset(int64_t flat) const {
  if (contiguous()) {
    return flat;
  }
  int64_t result = 0;
  for (size_t d = sizes.size(); d-- > 0;) {
    result += flat % sizes[d] * strides[d];
    flat /= sizes[d];
  }
  return result;
}

// Calls visit(offset of the first element, stride, elements) for the runs along the innermost dimension.
template <class Visit>
void Strided::for_each_run(int64_t start, int64_t count, const Visit& visit) const {
  if (contiguous()) {
    return visit(start, 1, count);
  }
  const size_t inner = sizes.size() - 1;
  std::vector<int64_t> index(sizes.size());
  for (size_t d = sizes.size(); d-- > 0; start /= sizes[d]) {
    index[d] = start % sizes[d];
  }
  int64_t base = 0;
  for (size_t d = 0; d < inner; ++d) {
    base += index[d] * strides[d];
  }
  while (count > 0) {
    const int64_t run = std::min(count, sizes[inner] - index[inner]);
    visit(base + index[inner] * strides[inner], strides[inner], run);
    count -= run;
    index[inner] = 0;
    for (size_t d = inner; d-- > 0;) {
      base += strides[d];
      if (++index[d] < sizes[d]) {
        break;
      }
      base -= strides[d] * sizes[d];
      index[d] = 0;
    }
  }
}

void Strided::gather(int64_t start, int64_t count, void* out) const {
  by_size(dtype, [&]<class T>(T) {
    T* to = static_cast<T*>(out);
    for_each_run(start, count, [&](int64_t offset, int64_t stride, int64_t run) {
      const T* from = reinterpret_cast<const T*>(data) + offset;
      for (int64_t i = 0; i < run; ++i) {
        *to++ = from[i * stride];
      }
    });
  });
}

void Strided::scatter(int64_t start, int64_t count, const void* in) const {
  by_size(dtype, [&]<class T>(T) {
    const T* from = static_cast<const T*>(in);
    for_each_run(start, count, [&](int64_t offset, int64_t stride, int64_t run) {
      T* to = reinterpret_cast<T*>(data) + offset;
      for (int64_t i = 0; i < run; ++i) {
        to[i * stride] = *from++;
      }
    });
  });
}

bool as_flat(const std::vector<Strided*>& tensors) {
  const Strided& first = *tensors[0];
  std::vector<size_t> order(first.sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return first.strides[a] < first.strides[b]; });
  for (const Strided* tensor : tensors) {
    // Tensors of one shape may have merged different dimensions; then their orders differ.
    if (tensor->sizes != first.sizes) {
      return false;
    }
    int64_t expected = 1;
    for (size_t d : order) {
      if (tensor->strides[d] != expected) {
        return false;
      }
      expected *= tensor->sizes[d];
    }
  }
  for (Strided* tensor : tensors) {
    tensor->sizes.assign(1, tensor->numel);
    tensor->strides.assign(1, 1);
  }
  return true;
}

std::vector<Chunk> chunks_of(const std::vector<Strided>& tensors) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i) {
    for (int64_t start = 0; start < tensors[i].numel; start += kChunk) {
      chunks.push_back({static_cast<int64_t>(i), start, std::min(kChunk, tensors[i].numel - start)});
    }
  }
  return chunks;
}

}  // namespace pyprune
