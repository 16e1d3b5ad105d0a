// Rows of small elements to columns, a square of 16-byte vectors at a time.
#pragma once

#include <cstdint>

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

template <class T>
struct Square {
  static constexpr int kSide = 16 / sizeof(T);
  typedef T Vector __attribute__((vector_size(16)));

  // Interleaves the first halves of two vectors, or the second ones.
  template <int kHalf>
  static Vector zip(Vector a, Vector b) {
    decltype(Vector{} < Vector{}) from{};  // integers as wide as T
    for (int lane = 0; lane < kSide; ++lane) {
      from[lane] = kHalf * kSide / 2 + lane / 2 + lane % 2 * kSide;
    }
    return __builtin_shuffle(a, b, from);
  }

  // to[j * to_step + i] = from[i * from_step + j]
  static void transpose(const T* from, int64_t from_step, T* to, int64_t to_step) {
    Vector rows[kSide], zipped[kSide];
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) {
      __builtin_memcpy(&rows[i], from + i * from_step, sizeof(Vector));
    }
    // Each step moves one bit of the row's number into the column's. Unrolled, all of it stays in registers.
#pragma GCC unroll 4
    for (int step = 1; step < kSide; step *= 2) {
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) {
        const Vector a = rows[i / 2], b = rows[i / 2 + kSide / 2];
        zipped[i] = i % 2 == 0 ? zip<0>(a, b) : zip<1>(a, b);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) {
        rows[i] = zipped[i];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSide; ++i) {
      __builtin_memcpy(to + i * to_step, &rows[i], sizeof(Vector));
    }
  }
};

// The same of a matrix of any size.
template <class T>
void transpose(const T* from, int64_t from_step, int64_t rows, int64_t columns, T* to, int64_t to_step) {
  constexpr int kSide = Square<T>::kSide;
  const int64_t whole_rows = rows / kSide * kSide, whole_columns = columns / kSide * kSide;
  for (int64_t row = 0; row < whole_rows; row += kSide) {
    for (int64_t column = 0; column < whole_columns; column += kSide) {
      Square<T>::transpose(from + row * from_step + column, from_step, to + column * to_step + row, to_step);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = row < whole_rows ? whole_columns : 0; column < columns; ++column) {
      to[column * to_step + row] = from[row * from_step + column];
    }
  }
}

}  // namespace
}  // namespace pyprune::PYPRUNE_CAPABILITY
