// The columns of a block of SparseGPT: what csrc/cpu/kernels/sparsegpt_block.h says, with the same bits.
//
// A thread has a row, and keeps the sums of four columns at a time in registers. The differences of the columns
// before are read from `sums`, where the thread has written them: 32 rows of 128 columns stay in the first-level
// cache. All threads read the same element of the factor. Without contraction (--fmad=false). Layout: columns one
// after the other. Moves per element: weight, sums and mask, read and written once.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace pyprune {

constexpr int kSparseGptThreads = 32;  // few: so that all multiprocessors have some rows
constexpr int64_t kColumnsTogether = 4;
constexpr int kLargestGroup = 64;

template <typename Real>
struct SparseGptBlock {
  Real* weight;
  Real* sums;
  const Real* factor;
  uint8_t* mask;
  int64_t weight_step, sums_step, factor_step, mask_step;  // from one row to the next
  int64_t rows, columns;
  int64_t kept, size;  // N:M; size 0: the mask is given
};

// Adds what the columns before `first` say to the sums of four columns, or of `count` if those are fewer.
template <typename Real>
__device__ inline void add_columns(const SparseGptBlock<Real>& block, Real* sums, int64_t first, int64_t column,
                                   int count) {
  Real sum[kColumnsTogether];
#pragma unroll
  for (int c = 0; c < kColumnsTogether; ++c) sum[c] = c < count ? sums[column + c] : Real{0};
  for (int64_t i = 0; i < first; ++i) {
    const Real difference = sums[i];
    const Real* const row = block.factor + i * block.factor_step + column;
#pragma unroll
    for (int c = 0; c < kColumnsTogether; ++c) {
      if (c < count) sum[c] += difference * row[c];
    }
  }
#pragma unroll
  for (int c = 0; c < kColumnsTogether; ++c) {
    if (c < count) sums[column + c] = sum[c];
  }
}

// Chooses the mask of a group, by scores as if all of it stayed.
template <typename Real>
__device__ inline void choose_group(const SparseGptBlock<Real>& block, const Real* weight, const Real* sums,
                                    uint8_t* mask, int64_t first, int width) {
  Real if_kept[kLargestGroup], scores[kLargestGroup];
  for (int k = 0; k < width; ++k) {
    const Real* const column = block.factor + first * block.factor_step + first + k;
    Real sum = sums[first + k];
    for (int i = 0; i < k; ++i) sum += if_kept[i] * column[i * block.factor_step];
    const Real diagonal = column[k * block.factor_step];
    if_kept[k] = -(sum * (1 / diagonal));
    const Real score = weight[first + k] * diagonal + sum;
    scores[k] = mask[first + k] == 0 ? Real{-1} : score < 0 ? -score : score;
  }
  for (int k = 0; k < width; ++k) {
    int beaten = 0;
    for (int i = 0; i < width; ++i) {
      beaten += i != k && (i < k ? scores[i] > scores[k] : scores[i] >= scores[k]);
    }
    if (beaten >= block.kept) mask[first + k] = 0;
  }
}

template <typename Real>
__global__ void __launch_bounds__(kSparseGptThreads)
    sparsegpt_block_kernel(const __grid_constant__ SparseGptBlock<Real> block) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSparseGptThreads + threadIdx.x;
  if (row >= block.rows) return;
  Real* const weight = block.weight + row * block.weight_step;
  Real* const sums = block.sums + row * block.sums_step;
  uint8_t* const mask = block.mask + row * block.mask_step;
  const int64_t group = block.size > 0 ? block.size : kColumnsTogether;
  for (int64_t first = 0; first < block.columns; first += group) {
    const int64_t end = first + group < block.columns ? first + group : block.columns;
    for (int64_t column = first; column < end; column += kColumnsTogether) {
      add_columns(block, sums, first, column, static_cast<int>(end - column));
    }
    if (block.size > 0) choose_group(block, weight, sums, mask, first, static_cast<int>(end - first));
    for (int64_t k = first; k < end; ++k) {
      Real sum = sums[k];
      for (int64_t i = first; i < k; ++i) sum += sums[i] * block.factor[i * block.factor_step + k];
      const Real kept = -(sum * (1 / block.factor[k * block.factor_step + k]));
      const bool stays = mask[k] != 0;
      sums[k] = stays ? kept : weight[k];
      weight[k] = stays ? weight[k] - kept : Real{0};
    }
  }
}

template <typename Real>
void launch_sparsegpt_block(const SparseGptBlock<Real>& block, cudaStream_t stream) {
  const int64_t blocks = (block.rows + kSparseGptThreads - 1) / kSparseGptThreads;
  launch(&sparsegpt_block_kernel<Real>, blocks, kSparseGptThreads, stream, block);
}

}  // namespace pyprune
