// What pack and unpack take, on the CPU and on CUDA: contiguous elements of 1, 2, 4 or 8 bytes, whatever they mean.
#pragma once

#include "check.h"

namespace pyprune {

// The bits of which one is set in an element that is not zero: all but the sign of floating point, unless -0.0 is to
// be told from 0.0. Types without a -0.0 have a value in its place.
inline uint64_t significant_bits(const torch::stable::Tensor& tensor, bool negative_zeros) {
  using torch::headeronly::ScalarType;
  if (negative_zeros) {
    return ~uint64_t{0};
  }
  switch (tensor.scalar_type()) {
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e5m2:
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Float:
    case ScalarType::Double: return (uint64_t{1} << (8 * tensor.element_size() - 1)) - 1;
    default: return ~uint64_t{0};
  }
}

inline void check_packable(const torch::stable::Tensor& tensor) {
  const auto size = tensor.element_size();
  STD_TORCH_CHECK(size == 1 || size == 2 || size == 4 || size == 8, "elements must have 1, 2, 4 or 8 bytes");
  STD_TORCH_CHECK(tensor.is_contiguous(), "tensors must be contiguous");
}

// No masks, or one for each tensor.
inline void check_pack(const std::vector<torch::stable::Tensor>& tensors,
                       const std::vector<torch::stable::Tensor>& masks) {
  STD_TORCH_CHECK(masks.empty() || masks.size() == tensors.size(), "expected no masks, or one per tensor");
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_packable(tensors[i]);
    if (!masks.empty()) {
      check_packable(masks[i]);
      STD_TORCH_CHECK(masks[i].scalar_type() == torch::headeronly::ScalarType::Bool &&
                          masks[i].sizes().vec() == tensors[i].sizes().vec() &&
                          masks[i].device() == tensors[i].device(),
                      "masks must be bool, of the shape of their tensors and on their device");
    }
  }
}

inline void check_unpack(const std::vector<torch::stable::Tensor>& bits,
                         const std::vector<torch::stable::Tensor>& values, const std::vector<int64_t>& counts) {
  STD_TORCH_CHECK(bits.size() == values.size() && bits.size() == counts.size(),
                  "expected bits, values and a count for each tensor");
  for (size_t i = 0; i < bits.size(); ++i) {
    check_packable(bits[i]);
    check_packable(values[i]);
    STD_TORCH_CHECK(bits[i].scalar_type() == torch::headeronly::ScalarType::Byte && counts[i] >= 0 &&
                        bits[i].numel() == counts[i] / 8 + (counts[i] % 8 != 0),
                    "bits must be uint8, one byte for eight elements");
    STD_TORCH_CHECK(bits[i].device() == values[i].device(), "bits and values must be on one device");
  }
}

// Returns how many elements there are in each.
inline std::vector<int64_t> check_unpack_into(const std::vector<torch::stable::Tensor>& values,
                                              const std::vector<torch::stable::Tensor>& out) {
  STD_TORCH_CHECK(out.size() == values.size(), "expected a tensor to write for each row of values");
  std::vector<int64_t> counts;
  for (size_t i = 0; i < out.size(); ++i) {
    check_packable(out[i]);
    STD_TORCH_CHECK(out[i].scalar_type() == values[i].scalar_type() && out[i].device() == values[i].device(),
                    "what is written must have the dtype and the device of the values");
    counts.push_back(out[i].numel());
  }
  return counts;
}

}  // namespace pyprune
