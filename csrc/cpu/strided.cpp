#include "strided.h"

#include <algorithm>
#include <cstdlib>
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

// A piece of the tensor whose elements, row by row, follow each other in the flat index.
struct Strided::Block {
  int64_t offset;  // of its first element
  int64_t rows, row_stride;
  int64_t columns, column_stride;
};

// Calls visit(block) for blocks of whole innermost rows, and for parts of a row where the range begins or ends in
// one.
template <class Visit>
void Strided::for_each_block(int64_t start, int64_t count, const Visit& visit) const {
  if (contiguous()) {
    return visit(Block{start, 1, 0, count, 1});
  }
  const size_t inner = sizes.size() - 1;
  std::vector<int64_t> index(sizes.size());
  for (size_t d = sizes.size(); d-- > 0; start /= sizes[d]) {
    index[d] = start % sizes[d];
  }
  while (count > 0) {
    int64_t offset = 0;
    for (size_t d = 0; d <= inner; ++d) {
      offset += index[d] * strides[d];
    }
    const bool whole = inner > 0 && index[inner] == 0 && count >= sizes[inner];
    const int64_t rows = whole ? std::min(count / sizes[inner], sizes[inner - 1] - index[inner - 1]) : 1;
    const int64_t columns = std::min(count, sizes[inner] - index[inner]);
    visit(Block{offset, rows, inner > 0 ? strides[inner - 1] : 0, columns, strides[inner]});
    count -= rows * columns;
    index[inner] += columns;
    if (index[inner] == sizes[inner] && inner > 0) {
      index[inner] = 0;
      index[inner - 1] += rows;
      for (size_t d = inner - 1; d > 0 && index[d] == sizes[d]; --d) {
        index[d] = 0;
        ++index[d - 1];
      }
    }
  }
}

// Columns of a block that are walked together where rows lie closer to each other than columns do: as many cache
// lines as stay in the first-level cache even if a power of two between them maps all to one set of it.
constexpr int64_t kColumnsTogether = 8;

// Calls move(element of the tensor, element of the contiguous run) for a block, so that each cache line of both is
// done with soon.
template <class T, class Move>
void Strided::walk(const Block& block, T* run, const Move& move) const {
  T* base = reinterpret_cast<T*>(data) + block.offset;
  const bool rows_are_close = block.rows > 1 && std::abs(block.row_stride) < std::abs(block.column_stride);
  const int64_t together = rows_are_close ? kColumnsTogether : block.columns;
  for (int64_t first = 0; first < block.columns; first += together) {
    const int64_t end = std::min(first + together, block.columns);
    for (int64_t row = 0; row < block.rows; ++row) {
      for (int64_t column = first; column < end; ++column) {
        move(base[row * block.row_stride + column * block.column_stride], run[row * block.columns + column]);
      }
    }
  }
}

char* Strided::in_a_row(int64_t start, int64_t count, Room& room) const {
  if (contiguous()) {
    return data + start * item_size(dtype);
  }
  char* const row = to_write(start, count, room);
  gather(start, count, row);
  return row;
}

char* Strided::to_write(int64_t start, int64_t count, Room& room) const {
  if (contiguous()) {
    return data + start * item_size(dtype);
  }
  room.resize(std::max(room.size(), static_cast<size_t>(count)));
  return reinterpret_cast<char*>(room.data());
}

void Strided::gather(int64_t start, int64_t count, void* out) const {
  by_size(dtype, [&]<class T>(T) {
    T* run = static_cast<T*>(out);
    for_each_block(start, count, [&](const Block& block) {
      walk(block, run, [](T& element, T& copy) { copy = element; });
      run += block.rows * block.columns;
    });
  });
}

void Strided::scatter(int64_t start, int64_t count, void* in) const {
  by_size(dtype, [&]<class T>(T) {
    T* run = static_cast<T*>(in);
    for_each_block(start, count, [&](const Block& block) {
      walk(block, run, [](T& element, T& copy) { element = copy; });
      run += block.rows * block.columns;
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

int64_t elements_of(const std::vector<Strided>& tensors) {
  return std::accumulate(tensors.begin(), tensors.end(), int64_t{0},
                         [](int64_t sum, const Strided& tensor) { return sum + tensor.numel; });
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
