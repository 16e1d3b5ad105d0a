#include "pack_sparse.h"

#include <cstring>

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

constexpr int64_t kStrip = 256;  // columns that are looked at together

// Columns of a strip in which one of some rows is not zero, with room for one more.
struct Strip {
  uint16_t columns[kStrip + 1];
  int64_t count;
};

template <class T>
void find(const T* data, int64_t step, int64_t rows, int64_t columns, T significant, Strip& strip) {
  T any[kStrip];
  for (int64_t c = 0; c < columns; ++c) {
    any[c] = data[c];
  }
  for (int64_t row = 1; row < rows; ++row) {
    for (int64_t c = 0; c < columns; ++c) {
      any[c] = static_cast<T>(any[c] | data[row * step + c]);
    }
  }
  int64_t count = 0;
  for (int64_t c = 0; c < columns; ++c) {
    strip.columns[count] = static_cast<uint16_t>(c);
    count += (any[c] & significant) != 0;
  }
  strip.count = count;
}

// Calls use(strip, data, rows, first column in the block) for the strips of a list.
template <class T, class Use>
void strips(const SparseShape& shape, const DenseRows& given, int64_t block, int64_t group, const Use& use) {
  const int64_t row = group * shape.rows_of_group(), rows = std::min(shape.rows_of_group(), given.rows - row);
  const int64_t columns = shape.columns_of(block);
  const T* const data = static_cast<const T*>(given.data) + row * shape.columns + block * shape.width;
  for (int64_t first = 0; first < columns; first += kStrip) {
    Strip strip;
    find(data + first, shape.columns, rows, std::min(kStrip, columns - first), static_cast<T>(given.significant),
         strip);
    use(strip, data + first, rows, first);
  }
}

int64_t filled(const SparseShape& shape, int64_t count) {
  const bool fills = shape.layout == SparseLayout::kIndex || shape.layout == SparseLayout::kRows;
  return fills ? (count + kFilled - 1) / kFilled * kFilled : count;
}

int64_t groups_of(const SparseShape& shape, const DenseRows& given) {
  return (given.rows + shape.rows_of_group() - 1) / shape.rows_of_group();
}

template <class T>
void count(const SparseShape& shape, const DenseRows& given, int32_t* counts, int64_t step) {
  for (int64_t group = 0; group < groups_of(shape, given); ++group) {
    for (int64_t block = 0; block < shape.blocks; ++block) {
      int64_t found = 0;
      strips<T>(shape, given, block, group,
                [&](const Strip& strip, const T*, int64_t, int64_t) { found += strip.count; });
      counts[block * step + group] = static_cast<int32_t>(filled(shape, found));
    }
  }
}

inline void put_index(const SparseShape& shape, uint8_t* index, int64_t entry, int64_t column) {
  index[entry * shape.index_size()] = static_cast<uint8_t>(column);
  if (shape.layout == SparseLayout::kRows) {
    index[entry * 2 + 1] = static_cast<uint8_t>(column >> 8);
  }
}

inline int64_t get_index(const SparseShape& shape, const uint8_t* index, int64_t entry) {
  return shape.layout == SparseLayout::kRows ? index[entry * 2] | index[entry * 2 + 1] << 8 : index[entry];
}

template <class T>
bool fill(const SparseShape& shape, const DenseRows& given, const int32_t* offsets, T* values, uint8_t* index) {
  const int64_t first = given.first_row / shape.rows_of_group();
  bool fits = true;
  for (int64_t group = 0; group < groups_of(shape, given); ++group) {
    for (int64_t block = 0; block < shape.blocks; ++block) {
      const int64_t list = block * shape.groups() + first + group, end = offsets[list + 1];
      int64_t entry = offsets[list];
      uint8_t* const mask = index + list * kMaskBytes;
      strips<T>(shape, given, block, group, [&](const Strip& strip, const T* data, int64_t rows, int64_t column) {
        fits &= entry + strip.count <= end;
        if (!fits) return;
        for (int64_t i = 0; i < strip.count; ++i, ++entry) {
          const int64_t c = strip.columns[i];
          if (shape.layout == SparseLayout::kBlock4) {
            for (int64_t row = 0; row < rows; ++row) {
              values[entry * 4 + row] = data[row * shape.columns + c];
            }
          } else {
            values[entry] = data[c];
          }
          if (shape.layout == SparseLayout::kBitmask) {
            mask[c / 8] = static_cast<uint8_t>(mask[c / 8] | 1 << c % 8);
          } else {
            put_index(shape, index, entry, column + c);
          }
        }
      });
      const int64_t wanted = offsets[list] + filled(shape, entry - offsets[list]);
      fits &= wanted == end;
      for (; fits && entry < end; ++entry) {
        put_index(shape, index, entry, shape.width);
      }
    }
  }
  return fits;
}

template <class T>
void unpack(const SparseShape& shape, int64_t first_group, int64_t groups, const int32_t* offsets, const T* values,
            const uint8_t* index, T* dense) {
  const int64_t height = shape.rows_of_group();
  for (int64_t group = first_group; group < first_group + groups; ++group) {
    T* const to = dense + group * height * shape.columns;
    const int64_t rows = std::min(height, shape.rows - group * height);
    std::fill(to, to + rows * shape.columns, T{0});
    for (int64_t block = 0; block < shape.blocks; ++block) {
      const int64_t list = block * shape.groups() + group;
      T* const part = to + block * shape.width;
      if (shape.layout == SparseLayout::kBitmask) {
        const uint8_t* const mask = index + list * kMaskBytes;
        for (int64_t c = 0, entry = offsets[list]; c < shape.columns_of(block); ++c) {
          if ((mask[c / 8] >> c % 8 & 1) != 0) part[c] = values[entry++];
        }
        continue;
      }
      for (int64_t entry = offsets[list]; entry < offsets[list + 1]; ++entry) {
        const int64_t column = get_index(shape, index, entry);
        for (int64_t row = 0; column < shape.width && row < rows; ++row) {
          part[row * shape.columns + column] = values[entry * height + row];
        }
      }
    }
  }
}

SparseFault check_list(const SparseShape& shape, int64_t list, int64_t begin, int64_t end, const uint8_t* index) {
  const int64_t columns = shape.columns_of(list / shape.groups());
  if (shape.layout == SparseLayout::kBitmask) {
    const uint8_t* const mask = index + list * kMaskBytes;
    int64_t set = 0;
    for (int64_t i = 0; i < kMaskBytes; ++i) {
      set += __builtin_popcount(mask[i]);
      const int64_t here = std::clamp(columns - i * 8, int64_t{0}, int64_t{8});
      if (mask[i] >> here != 0) return SparseFault::kColumn;
    }
    return set == end - begin ? SparseFault::kNone : SparseFault::kCount;
  }
  if (filled(shape, end - begin) != end - begin) return SparseFault::kCount;
  for (int64_t entry = begin, last = -1; entry < end; ++entry) {
    const int64_t column = get_index(shape, index, entry);
    const bool fills = column == shape.width && entry >= end - kFilled && shape.layout != SparseLayout::kBlock4;
    if (!fills && column >= columns) return SparseFault::kColumn;
    if (column <= last && !(fills && last == column)) return SparseFault::kOrder;
    last = column;
  }
  return SparseFault::kNone;
}

}  // namespace

void count_lists(const SparseShape& shape, const DenseRows& rows, int32_t* counts, int64_t step) {
  switch (rows.size) {
    case 1: return count<uint8_t>(shape, rows, counts, step);
    case 2: return count<uint16_t>(shape, rows, counts, step);
    default: return count<uint32_t>(shape, rows, counts, step);
  }
}

bool fill_lists(const SparseShape& shape, const DenseRows& rows, const int32_t* offsets, void* values,
                uint8_t* index) {
  switch (rows.size) {
    case 1: return fill(shape, rows, offsets, static_cast<uint8_t*>(values), index);
    case 2: return fill(shape, rows, offsets, static_cast<uint16_t*>(values), index);
    default: return fill(shape, rows, offsets, static_cast<uint32_t*>(values), index);
  }
}

void unpack_lists(const SparseShape& shape, int64_t first_group, int64_t groups, const int32_t* offsets,
                  const void* values, int64_t size, const uint8_t* index, void* dense) {
  const auto run = [&]<class T>(T* to) {
    unpack(shape, first_group, groups, offsets, static_cast<const T*>(values), index, to);
  };
  switch (size) {
    case 1: return run(static_cast<uint8_t*>(dense));
    case 2: return run(static_cast<uint16_t*>(dense));
    default: return run(static_cast<uint32_t*>(dense));
  }
}

SparseFault check_lists(const SparseShape& shape, int64_t first_list, int64_t lists, const int32_t* offsets,
                        int64_t entries, const uint8_t* index) {
  for (int64_t list = first_list; list < first_list + lists; ++list) {
    const int64_t begin = offsets[list], end = offsets[list + 1];
    if (begin < 0 || end < begin || end > entries) return SparseFault::kOffset;
    const SparseFault fault = check_list(shape, list, begin, end, index);
    if (fault != SparseFault::kNone) return fault;
  }
  return SparseFault::kNone;
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
