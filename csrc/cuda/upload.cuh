// The host side of every operator: torch's allocator and streams, and a list of tensors as a table on their device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../check.h"
#include "kernels/launch.cuh"

// Hidden, as torch's stable types are.
HIDDEN_NAMESPACE_BEGIN(pyprune)

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Uninitialised device memory from torch's allocator; later work on the same stream may reuse it once this is gone.
template <typename Item>
struct DeviceArray {
  DeviceArray(const Tensor& like, int64_t count) : storage(allocate(like, count * sizeof(Item))) {
    data = static_cast<Item*>(storage.mutable_data_ptr());
  }
  Tensor storage;
  Item* data;

 private:
  static Tensor allocate(const Tensor& like, int64_t bytes) {
    return torch::stable::new_empty(like, {&bytes, 1}, ScalarType::Byte);
  }
};

// A new contiguous tensor of `count` elements on the device of `like`.
inline Tensor new_vector(const Tensor& like, int64_t count, ScalarType dtype) {
  return torch::stable::new_empty(like, {&count, 1}, dtype);
}

enum class Writes { kNothing, kTensors, kPartners };

struct Dim {
  int64_t size;
  int64_t stride;
  int64_t partner_stride;
};

// Drops dims of size one and joins dims that one stride can walk, for the tensor and its partner at once.
inline std::vector<Dim> coalesce(const Tensor& tensor, const Tensor* partner, Order order) {
  std::vector<Dim> dims;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    const int64_t stride = tensor.stride(d);
    if (tensor.size(d) != 1)
      dims.push_back({tensor.size(d), stride, partner == nullptr ? stride : partner->stride(d)});
  }
  if (order == Order::kAny) {
    std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.stride > b.stride; });
  }
  std::vector<Dim> joined;
  for (const Dim& dim : dims) {
    if (!joined.empty() && joined.back().stride == dim.stride * dim.size &&
        joined.back().partner_stride == dim.partner_stride * dim.size) {
      joined.back() = {joined.back().size * dim.size, dim.stride, dim.partner_stride};
    } else {
      joined.push_back(dim);
    }
  }
  return joined;
}

inline bool is_contiguous(const std::vector<Dim>& dims) {
  return dims.empty() || (dims.size() == 1 && dims[0].stride == 1 && dims[0].partner_stride == 1);
}

// Builds the table of a list of tensors (and their partners, or null) and sends it to their device.
class UploadedTable {
 public:
  // `bases` is empty, or has one for some tensors, laid out as their partners.
  UploadedTable(const std::vector<Tensor>& tensors, const std::vector<Tensor>* partners, Order order, Writes writes,
                cudaStream_t stream, const std::vector<std::optional<Tensor>>& bases = {}) {
    std::vector<Layout> layouts;
    int64_t tiles = 0, elements = 0;
    const int32_t device = tensors[0].get_device_index();
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor* const partner = partners == nullptr ? nullptr : &(*partners)[i];
      check(tensors[i], partner, device);
      host_rows.push_back(describe(tensors[i], partner, order, writes, layouts));
      if (!bases.empty() && bases[i].has_value()) host_rows.back().base = base_of(*bases[i], *partner, device);
      host_rows.back().first_tile = tiles;
      host_rows.back().first_element = elements;
      tiles += tiles_of(host_rows.back());
      elements += host_rows.back().numel;
    }
    rows_.emplace(tensors[0], static_cast<int64_t>(host_rows.size()));
    layouts_.emplace(tensors[0], static_cast<int64_t>(layouts.size()));
    upload(host_rows, rows_->data, stream);
    upload(layouts, layouts_->data, stream);
    table = {rows_->data, layouts_->data, static_cast<int32_t>(host_rows.size()), tiles};
  }

  std::vector<TableRow> host_rows;
  TensorTable table;

 private:
  // A pointer of another device would take the whole process's CUDA context down.
  static void check(const Tensor& tensor, const Tensor* partner, int32_t device) {
    for (const Tensor* one : {&tensor, partner}) {
      STD_TORCH_CHECK(one == nullptr || (one->is_cuda() && one->get_device_index() == device),
                      "all tensors must be on one CUDA device");
    }
    STD_TORCH_CHECK(partner == nullptr || partner->sizes().vec() == tensor.sizes().vec(),
                    "tensor and partner differ in shape");
  }

  static const uint8_t* base_of(const Tensor& base, const Tensor& partner, int32_t device) {
    STD_TORCH_CHECK(base.is_cuda() && base.get_device_index() == device, "all tensors must be on one CUDA device");
    for (int64_t d = 0; d < base.dim(); ++d) {
      STD_TORCH_CHECK(base.size(d) <= 1 || base.stride(d) == partner.stride(d),
                      "a base must be laid out as its mask");
    }
    return static_cast<const uint8_t*>(base.const_data_ptr());
  }

  static TableRow describe(const Tensor& tensor, const Tensor* partner, Order order, Writes writes,
                           std::vector<Layout>& layouts) {
    TableRow row{};
    row.data = writes == Writes::kTensors ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
    if (partner != nullptr) {
      row.partner =
          writes == Writes::kPartners ? partner->mutable_data_ptr() : const_cast<void*>(partner->const_data_ptr());
    }
    row.numel = tensor.numel();
    row.dtype = dtype_of(tensor);
    row.layout = -1;
    const std::vector<Dim> dims = coalesce(tensor, partner, order);
    row.contiguous = row.numel == 0 || is_contiguous(dims);
    row.dense = row.contiguous || is_contiguous(coalesce(tensor, nullptr, Order::kAny));
    if (!row.contiguous) {
      STD_TORCH_CHECK(dims.size() <= kMaxDims, "a tensor has ", dims.size(), " dimensions that cannot be joined; ",
                      kMaxDims, " are supported: call .contiguous() on it first");
      row.layout = static_cast<int32_t>(layouts.size());
      Layout layout{};
      layout.dims = static_cast<int32_t>(dims.size());
      layout.narrow = row.numel < (int64_t{1} << 32) ? 1 : 0;
      for (size_t d = 0; d < dims.size(); ++d) {
        layout.sizes[d] = dims[d].size;
        layout.strides[d] = dims[d].stride;
        layout.partner_strides[d] = dims[d].partner_stride;
      }
      layouts.push_back(layout);
    }
    return row;
  }

  std::optional<DeviceArray<TableRow>> rows_;
  std::optional<DeviceArray<Layout>> layouts_;
};

HIDDEN_NAMESPACE_END(pyprune)
