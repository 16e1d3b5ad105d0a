#include "sparsegpt_block.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "transpose.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif
// Two vectors of rows for each four columns: eight sums at a time, which hides how long an addition takes.
constexpr int64_t kVectors = 2;

template <class Real>
struct Block {
  using Whole = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;
  typedef Real Vector __attribute__((vector_size(kVectorBytes)));
  typedef Whole Choice __attribute__((vector_size(kVectorBytes)));  // -1: yes, 0: no
  static constexpr int64_t kLanes = kVectorBytes / sizeof(Real);
  static constexpr int64_t kRows = kVectors * kLanes;

  Block(const SparseGptRows& given, const void* packed, void* room)
      : block(given),
        factor(static_cast<const Real*>(packed)),
        sums(static_cast<Vector*>(room)),
        weights(sums + block.columns * kVectors),
        stays(reinterpret_cast<Choice*>(weights + block.columns * kVectors)),
        if_kept(reinterpret_cast<Vector*>(stays + block.columns * kVectors)),
        scores(if_kept + kLargestGroup * kVectors),
        bytes(reinterpret_cast<uint8_t*>(scores + kLargestGroup * kVectors)) {}

  void solve() {
    for (int64_t row = 0; row < block.rows; row += kRows) {
      const int64_t rows = std::min(kRows, block.rows - row);
      load(row, rows);
      const Real* next = factor;
      for (int64_t first = 0; first < block.columns; first += group_width(block.size)) {
        next = solve_group(first, std::min(group_width(block.size), block.columns - first), next);
      }
      store(row, rows);
    }
  }

 private:
  Real* at(void* data, int64_t row, int64_t step) const { return static_cast<Real*>(data) + row * step; }

  void load(int64_t row, int64_t rows) {
    if (rows < kRows) {  // the other lanes count for nothing, but are computed
      std::memset(static_cast<void*>(sums), 0, block.columns * kRows * sizeof(Real));
      std::memset(static_cast<void*>(weights), 0, block.columns * kRows * sizeof(Real));
      std::memset(bytes, 0, block.columns * kRows);
    }
    transpose(at(block.sums, row, block.sums_step), block.sums_step, rows, block.columns,
              reinterpret_cast<Real*>(sums), kRows);
    transpose(at(block.weight, row, block.weight_step), block.weight_step, rows, block.columns,
              reinterpret_cast<Real*>(weights), kRows);
    transpose(block.mask + row * block.mask_step, block.mask_step, rows, block.columns, bytes, kRows);
    Whole* const choices = reinterpret_cast<Whole*>(stays);
    for (int64_t i = 0; i < block.columns * kRows; ++i) {
      choices[i] = bytes[i] != 0 ? -1 : 0;
    }
  }

  void store(int64_t row, int64_t rows) {
    transpose(reinterpret_cast<const Real*>(sums), kRows, block.columns, rows, at(block.sums, row, block.sums_step),
              block.sums_step);
    transpose(reinterpret_cast<const Real*>(weights), kRows, block.columns, rows,
              at(block.weight, row, block.weight_step), block.weight_step);
    if (block.size > 0) {
      const Whole* const choices = reinterpret_cast<const Whole*>(stays);
      for (int64_t i = 0; i < block.columns * kRows; ++i) {
        bytes[i] = static_cast<uint8_t>(choices[i] & 1);
      }
      transpose(bytes, kRows, block.columns, rows, block.mask + row * block.mask_step, block.mask_step);
    }
  }

  const Real* solve_group(int64_t first, int64_t width, const Real* next) {
    for (int64_t column = first; column < first + width; column += kColumnsTogether) {
      switch (std::min(kColumnsTogether, first + width - column)) {
        case 1: next = add_columns<1>(first, column, next); break;
        case 2: next = add_columns<2>(first, column, next); break;
        case 3: next = add_columns<3>(first, column, next); break;
        default: next = add_columns<4>(first, column, next);
      }
    }
    if (block.size > 0) {
      score(first, width, next);
      choose(first, width);
    }
    for (int64_t k = 0; k < width; ++k) {
      for (int64_t v = 0; v < kVectors; ++v) {
        const int64_t place = (first + k) * kVectors + v;
        Vector sum = sums[place];
        for (int64_t i = 0; i < k; ++i) {
          sum += sums[(first + i) * kVectors + v] * next[i];
        }
        const Vector kept = -(sum * next[k + 1]), zero{};
        sums[place] = stays[place] ? kept : weights[place];
        weights[place] = stays[place] ? weights[place] - kept : zero;
      }
      next += k + 2;
    }
    return next;
  }

  // Adds what the columns before `first` say to the sums of some columns.
  template <int64_t kColumns>
  const Real* add_columns(int64_t first, int64_t column, const Real* next) {
    Vector sum[kColumns][kVectors];
    Vector* const to = sums + column * kVectors;
    for (int64_t c = 0; c < kColumns; ++c) {
      for (int64_t v = 0; v < kVectors; ++v) {
        sum[c][v] = to[c * kVectors + v];
      }
    }
    for (int64_t i = 0; i < first; ++i, next += kColumns) {
      for (int64_t c = 0; c < kColumns; ++c) {
        for (int64_t v = 0; v < kVectors; ++v) {
          sum[c][v] += sums[i * kVectors + v] * next[c];
        }
      }
    }
    for (int64_t c = 0; c < kColumns; ++c) {
      for (int64_t v = 0; v < kVectors; ++v) {
        to[c * kVectors + v] = sum[c][v];
      }
    }
    return next;
  }

  // The scores of a group, as if all of it stayed; -1 of what never stays.
  void score(int64_t first, int64_t width, const Real* next) {
    for (int64_t k = 0; k < width; ++k) {
      for (int64_t v = 0; v < kVectors; ++v) {
        const int64_t place = (first + k) * kVectors + v;
        Vector sum = sums[place];
        for (int64_t i = 0; i < k; ++i) {
          sum += if_kept[i * kVectors + v] * next[i];
        }
        if_kept[k * kVectors + v] = -(sum * next[k + 1]);
        const Vector signed_score = weights[place] * next[k] + sum, none = Vector{} - 1;
        const Vector size = signed_score < 0 ? -signed_score : signed_score;
        scores[k * kVectors + v] = stays[place] ? size : none;
      }
      next += k + 2;
    }
  }

  void choose(int64_t first, int64_t width) {
    const Whole kept = static_cast<Whole>(block.kept);
    for (int64_t k = 0; k < width; ++k) {
      for (int64_t v = 0; v < kVectors; ++v) {
        const Vector own = scores[k * kVectors + v];
        Choice beaten{};  // minus the number of those that are larger
        for (int64_t i = 0; i < k; ++i) {
          beaten += scores[i * kVectors + v] > own;
        }
        for (int64_t i = k + 1; i < width; ++i) {
          beaten += scores[i * kVectors + v] >= own;
        }
        stays[(first + k) * kVectors + v] &= beaten > -kept;
      }
    }
  }

  const SparseGptRows& block;
  const Real* factor;
  // For each column the rows side by side. Sums become differences.
  Vector *sums, *weights;
  Choice* stays;
  Vector *if_kept, *scores;  // of one group
  uint8_t* bytes;
};

// For each group: the rows above it, for a few of its columns at a time; then column by column what is above the
// diagonal, the diagonal and its inverse.
template <class Real>
void pack(const Real* factor, int64_t step, int64_t columns, int64_t size, Real* packed) {
  for (int64_t first = 0; first < columns; first += group_width(size)) {
    const int64_t end = std::min(first + group_width(size), columns);
    for (int64_t column = first; column < end; column += kColumnsTogether) {
      for (int64_t i = 0; i < first; ++i) {
        for (int64_t c = column; c < std::min(column + kColumnsTogether, end); ++c) {
          *packed++ = factor[i * step + c];
        }
      }
    }
    for (int64_t column = first; column < end; ++column) {
      for (int64_t i = first; i <= column; ++i) {
        *packed++ = factor[i * step + column];
      }
      *packed++ = 1 / factor[column * step + column];
    }
  }
}

}  // namespace

void pack_factor(const void* factor, int64_t step, Dtype dtype, int64_t columns, int64_t size, void* packed) {
  if (dtype == Dtype::kFloat64) {
    pack(static_cast<const double*>(factor), step, columns, size, static_cast<double*>(packed));
  } else {
    pack(static_cast<const float*>(factor), step, columns, size, static_cast<float*>(packed));
  }
}

void sparsegpt_rows(const SparseGptRows& block, const void* packed, void* room) {
  if (block.dtype == Dtype::kFloat64) {
    Block<double>(block, packed, room).solve();
  } else {
    Block<float>(block, packed, room).solve();
  }
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
