// Tensors and their masks of units, sent to their device.
#pragma once

#include "kernels/unit_pattern.cuh"
#include "upload.cuh"

HIDDEN_NAMESPACE_BEGIN(pyprune)

// The order of dimensions is that of Order::kAny.
inline UnitLayout unit_layout(const Tensor& tensor, const Tensor& units, const int64_t* block) {
  struct UnitDim {
    int64_t size, stride, block, unit_stride;
  };
  std::vector<UnitDim> dims;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) {
      dims.push_back({tensor.size(d), tensor.stride(d), std::min(block[d], std::max<int64_t>(1, tensor.size(d))),
                      units.stride(d)});
    }
  }
  std::stable_sort(dims.begin(), dims.end(), [](const UnitDim& a, const UnitDim& b) { return a.stride > b.stride; });
  std::vector<UnitDim> joined;
  for (const UnitDim& dim : dims) {
    const bool follows = !joined.empty() && joined.back().stride == dim.stride * dim.size;
    if (follows && dim.block == dim.size) {
      UnitDim& outer = joined.back();
      outer = {outer.size * dim.size, dim.stride, outer.block * dim.size, outer.unit_stride};
    } else if (follows && joined.back().block == 1 && dim.size % dim.block == 0 &&
               joined.back().unit_stride == dim.size / dim.block * dim.unit_stride) {
      joined.back() = {joined.back().size * dim.size, dim.stride, dim.block, dim.unit_stride};
    } else {
      joined.push_back(dim);
    }
  }
  if (joined.empty()) joined.push_back({1, 1, 1, 1});
  STD_TORCH_CHECK(joined.size() <= kMaxDims, "a tensor has ", joined.size(),
                  " dimensions of units that cannot be joined; ", kMaxDims, " are supported");
  UnitLayout layout{};
  layout.units = static_cast<const uint8_t*>(units.const_data_ptr());
  layout.narrow = tensor.numel() < (int64_t{1} << 32) ? 1 : 0;
  for (const UnitDim& dim : joined) {
    layout.sizes[layout.dims] = dim.size;
    layout.strides[layout.dims] = dim.stride;
    layout.blocks[layout.dims] = dim.block;
    layout.unit_strides[layout.dims++] = dim.unit_stride;
  }
  return layout;
}

// Writes into tensors what their masks of units say.
template <bool kFold>
void write_unit_pattern(const std::vector<Tensor>& tensors, const std::vector<Tensor>& unit_masks,
                        const std::vector<int64_t>& blocks) {
  check_unit_masks(unit_masks, tensors, blocks);
  if (tensors.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  const cudaStream_t stream = current_stream(tensors[0]);
  const UploadedTable uploaded(tensors, nullptr, Order::kAny, Writes::kTensors, stream);
  std::vector<UnitLayout> layouts;
  const int64_t* block = blocks.data();
  for (size_t i = 0; i < tensors.size(); ++i) {
    STD_TORCH_CHECK(unit_masks[i].is_cuda() && unit_masks[i].get_device_index() == tensors[0].get_device_index(),
                    "masks of units must be on the CUDA device of the tensors");
    layouts.push_back(unit_layout(tensors[i], unit_masks[i], block));
    block += tensors[i].dim();
  }
  const DeviceArray<UnitLayout> on_device(tensors[0], static_cast<int64_t>(layouts.size()));
  upload(layouts, on_device.data, stream);
  launch_unit_pattern<kFold>(uploaded.table, on_device.data, stream);
}

HIDDEN_NAMESPACE_END(pyprune)
