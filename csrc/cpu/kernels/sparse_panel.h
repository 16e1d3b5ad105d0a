// What is around the products with a sparse weight: rows of activations to panels of columns, and sums of columns
// with scale, bias and activation to rows of results. Every element is read and written once.
#pragma once

#include "../../dtype.h"
#include "capability_namespace.h"

namespace pyprune {

enum class Activation : uint8_t { kNone, kRelu, kGelu, kGeluTanh, kSilu };
constexpr int64_t kActivations = 5;

// Rows of float32, bfloat16 or float16, `step` elements from one to the next.
struct Activations {
  Dtype dtype;
  void* data;
  int64_t step;
  int64_t rows;
};

// act(sum * scale + bias) for each row of the weight.
struct Epilogue {
  const float* scale;  // or none
  const float* bias;   // or none
  Activation activation;
};

}  // namespace pyprune

// pack_panel: panel[column][lane] = rows[lane][first + column] for so many columns, and zeros in the lanes beyond the
// rows and in the columns from there up to `width` and with it.
// finish_sums: rows[lane][first + i] = act(sums[i][lane] * scale[first + i] + bias[first + i]) for so many i; sums
// are written over.
#define PYPRUNE_DECLARE_SPARSE_PANEL                                                                     \
  void pack_panel(const Activations& from, int64_t first, int64_t columns, int64_t width, int64_t lanes, \
                  float* panel);                                                                         \
  void finish_sums(float* sums, int64_t lanes, const Epilogue& epilogue, int64_t first, int64_t count,   \
                   const Activations& to);                                                               \
  void floats_of(const Activations& from, int64_t count, float* to);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_SPARSE_PANEL)
