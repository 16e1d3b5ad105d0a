#include "sparse_panel.h"

#include "../../gate_math.h"
#include "float_lanes.h"
#include "transpose.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

constexpr int64_t kStrip = 256;  // columns that are converted together
constexpr int64_t kRows = 8;     // and rows
// Rows of a large matrix lie where one evicts the other from the first-level cache, so of each whole lines are used
// before the next.
constexpr int64_t kTogether = 64;

inline const void* at(const Activations& rows, int64_t row, int64_t column) {
  return static_cast<const char*>(rows.data) + (row * rows.step + column) * item_size(rows.dtype);
}

void to_floats(Dtype dtype, const void* from, int64_t count, float* to) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  const uint16_t* const bits = static_cast<const uint16_t*>(from);
  if (dtype == Dtype::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = bfloat16_to_float(bits[i]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      to[i] = float16_to_float(bits[i]);
    }
  }
}

void from_floats(Dtype dtype, const float* from, int64_t count, void* to) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  uint16_t* const bits = static_cast<uint16_t*>(to);
  if (dtype == Dtype::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) {
      bits[i] = float_to_bfloat16(from[i]);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      bits[i] = float_to_float16(from[i]);
    }
  }
}

// erf(x) by a quotient of polynomials in x^2 (as in Eigen): off by 4e-7 of itself at most.
inline float error_function(float x) {
  x = 4.0f < x ? 4.0f : x;
  x = -4.0f > x ? -4.0f : x;
  const float y = x * x;
  float p = -2.72614225801306e-10f, q = -1.45660718464996e-05f;
  for (const float c : {2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f, -7.34990630326855e-04f,
                        -2.95459980854025e-03f, -1.60960333262415e-02f}) {
    p = p * y + c;
  }
  for (const float c :
       {-2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f, -1.42647390514189e-02f}) {
    q = q * y + c;
  }
  return x * p / q;
}

// x / (1 + e^-y), and zero where that is below 1e-15.
inline float gated(float x, float y) {
  const float some = x / (1 + exponential(within_range(-y)));
  return y < -40 ? x * 0 : some;
}

template <class Function>
void for_all(float* x, int64_t count, const Function& f) {
  for (int64_t i = 0; i < count; ++i) {
    x[i] = f(x[i]);
  }
}

void activate(Activation activation, float* x, int64_t count) {
  switch (activation) {
    case Activation::kNone: return;
    case Activation::kRelu: return for_all(x, count, [](float v) { return v < 0 ? 0.0f : v; });  // NaN stays
    case Activation::kGelu:
      return for_all(x, count, [](float v) { return 0.5f * v * (1 + error_function(v * 0.70710678f)); });
    case Activation::kGeluTanh:
      return for_all(x, count, [](float v) { return gated(v, 1.5957691f * (v + 0.044715f * v * v * v)); });
    case Activation::kSilu: return for_all(x, count, [](float v) { return gated(v, v); });
  }
}

}  // namespace

void floats_of(const Activations& from, int64_t count, float* to) {
  to_floats(from.dtype, from.data, count, to);
}

void pack_panel(const Activations& from, int64_t first, int64_t columns, int64_t width, int64_t lanes, float* panel) {
  if (lanes == 1) {
    to_floats(from.dtype, at(from, 0, first), columns, panel);
    std::fill(panel + columns, panel + width + 1, 0.0f);
    return;
  }
  std::fill(panel + columns * lanes, panel + (width + 1) * lanes, 0.0f);
  for (int64_t column = 0; from.rows < lanes && column < columns; ++column) {
    std::fill(panel + column * lanes + from.rows, panel + (column + 1) * lanes, 0.0f);
  }
  if (from.dtype == Dtype::kFloat32) {
    for (int64_t column = 0; column < columns; column += kTogether) {
      transpose(static_cast<const float*>(at(from, 0, first + column)), from.step, from.rows,
                std::min(kTogether, columns - column), panel + column * lanes, lanes);
    }
    return;
  }
  alignas(64) float strip[kRows * kStrip];
  for (int64_t column = 0; column < columns; column += kStrip) {
    const int64_t some = std::min(kStrip, columns - column);
    for (int64_t row = 0; row < from.rows; row += kRows) {
      const int64_t rows = std::min(kRows, from.rows - row);
      for (int64_t i = 0; i < rows; ++i) {
        to_floats(from.dtype, at(from, row + i, first + column), some, strip + i * kStrip);
      }
      transpose(strip, kStrip, rows, some, panel + column * lanes + row, lanes);
    }
  }
}

void finish_sums(float* sums, int64_t lanes, const Epilogue& epilogue, int64_t first, int64_t count,
                 const Activations& to) {
  if (epilogue.scale != nullptr || epilogue.bias != nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      const float scale = epilogue.scale == nullptr ? 1 : epilogue.scale[first + i];
      const float bias = epilogue.bias == nullptr ? 0 : epilogue.bias[first + i];
      for (int64_t lane = 0; lane < lanes; ++lane) {
        sums[i * lanes + lane] = sums[i * lanes + lane] * scale + bias;
      }
    }
  }
  activate(epilogue.activation, sums, count * lanes);
  if (lanes == 1) {
    from_floats(to.dtype, sums, count, const_cast<void*>(at(to, 0, first)));
    return;
  }
  if (to.dtype == Dtype::kFloat32) {
    for (int64_t i = 0; i < count; i += kTogether) {
      const int64_t some = std::min(kTogether, count - i);
      for (int64_t row = 0; row < to.rows; row += kRows) {
        transpose(sums + i * lanes + row, lanes, some, std::min(kRows, to.rows - row),
                  static_cast<float*>(const_cast<void*>(at(to, row, first + i))), to.step);
      }
    }
    return;
  }
  alignas(64) float strip[kRows * kStrip];
  for (int64_t i = 0; i < count; i += kStrip) {
    const int64_t some = std::min(kStrip, count - i);
    for (int64_t row = 0; row < to.rows; row += kRows) {
      const int64_t rows = std::min(kRows, to.rows - row);
      transpose(sums + i * lanes + row, lanes, some, rows, strip, kStrip);
      for (int64_t j = 0; j < rows; ++j) {
        from_floats(to.dtype, strip + j * kStrip, some, const_cast<void*>(at(to, row + j, first + i)));
      }
    }
  }
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
