// group_masks: what torch hands over, as the kernels want it.
#include "kernels/group_masks.cuh"
#include "upload.cuh"

namespace pyprune {
namespace {

// Dims [first, last) of a tensor, joined where one stride can walk them.
std::vector<Dim> dims_of(const Tensor& tensor, int64_t first, int64_t last) {
  std::vector<Dim> dims;
  for (int64_t d = first; d < last; ++d) {
    const Dim dim{tensor.size(d), tensor.stride(d), 0};
    if (dim.size == 1) continue;
    if (!dims.empty() && dims.back().stride == dim.stride * dim.size) {
      dims.back() = {dims.back().size * dim.size, dim.stride, 0};
    } else {
      dims.push_back(dim);
    }
  }
  return dims;
}

int64_t elements_of(const Tensor& tensor, int64_t first, int64_t last) {
  int64_t product = 1;
  for (int64_t d = first; d < last; ++d) product *= tensor.size(d);
  return product;
}

// Sets the step from one column to the next; false if there is none.
bool set_step(const Tensor& tensor, int64_t row_dims, int64_t& step) {
  const std::vector<Dim> columns = dims_of(tensor, row_dims, tensor.dim());
  step = columns.empty() ? 1 : columns.back().stride;
  return columns.size() <= 1;
}

GroupRow group_row(const Tensor& weight, const Tensor& mask, const std::optional<Tensor>& factors,
                   const std::optional<Tensor>& base, int64_t size, int64_t kept, int64_t row_dims) {
  STD_TORCH_CHECK(0 <= row_dims && row_dims < weight.dim(), "row_dims must leave a dimension for the columns");
  STD_TORCH_CHECK(size >= 1 && 0 <= kept && kept <= size, "cannot keep ", kept, " of ", size);
  GroupRow row{};
  int64_t rows = elements_of(weight, 0, row_dims);
  row.columns = elements_of(weight, row_dims, weight.dim());
  row.size = std::min(size, std::max<int64_t>(row.columns, 1));
  row.kept = kept;
  row.has_base = base.has_value();
  row.has_steps = set_step(weight, row_dims, row.weight_step);
  row.has_steps &= set_step(mask, row_dims, row.mask_step);
  if (base.has_value()) row.has_steps &= set_step(*base, row_dims, row.base_step);
  if (factors.has_value()) {
    row.factors = factors->const_data_ptr();
    row.factor_stride = factors->stride(0);
  }
  STD_TORCH_CHECK(row.size < (int64_t{1} << 32), "groups of 2^32 columns and more are not supported");
  row.rows_together = 1;
  const std::vector<Dim> row_dims_joined = dims_of(weight, 0, row_dims);
  if (!row_dims_joined.empty() && row_dims_joined.back().stride < row.weight_step) {
    row.rows_together = row_dims_joined.back().size;
  }
  row.groups_in_row = (row.columns + row.size - 1) / row.size;
  row.groups = rows * row.groups_in_row;
  return row;
}

Tensor group_masks(const std::vector<Tensor>& weights, const std::vector<int64_t>& sizes,
                   const std::vector<int64_t>& kept, const std::vector<int64_t>& row_dims,
                   const std::vector<std::optional<Tensor>>& factors, const std::vector<std::optional<Tensor>>& bases,
                   const std::vector<Tensor>& masks) {
  const size_t n = weights.size();
  STD_TORCH_CHECK(n > 0, "group_masks needs at least one weight");
  STD_TORCH_CHECK(
      sizes.size() == n && kept.size() == n && row_dims.size() == n && factors.size() == n && bases.size() == n,
      "expected one of each per weight");
  check_masks(masks, weights);
  const int32_t device = weights[0].get_device_index();
  std::vector<Tensor> bases_or_masks = masks;  // where there is no base, nothing is read
  bool any_base = false;
  for (size_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(dtype_of(weights[i]) != Dtype::kBool, "weights must be floating point");
    const Dtype wanted = dtype_of(weights[i]) == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    STD_TORCH_CHECK(
        !factors[i].has_value() ||
            (factors[i]->is_cuda() && factors[i]->get_device_index() == device && dtype_of(*factors[i]) == wanted &&
             factors[i]->dim() == 1 && factors[i]->numel() == elements_of(weights[i], row_dims[i], weights[i].dim())),
        "expected one factor per column on the weights' device, float64 for float64 weights and float32 "
        "for others");
    if (bases[i].has_value()) {
      STD_TORCH_CHECK(dtype_of(*bases[i]) == Dtype::kBool && bases[i]->sizes().vec() == weights[i].sizes().vec(),
                      "a base is bool and has the shape of its weight");
      bases_or_masks[i] = *bases[i];
      any_base = true;
    }
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(weights[0]);
  const UploadedTable uploaded(weights, &masks, Order::kLogical, Writes::kPartners, stream);
  std::optional<UploadedTable> uploaded_bases;
  if (any_base) uploaded_bases.emplace(bases_or_masks, nullptr, Order::kLogical, Writes::kNothing, stream);
  Tensor nonfinite = new_vector(weights[0], static_cast<int64_t>(n), ScalarType::Long);
  int64_t* const counts = static_cast<int64_t*>(nonfinite.mutable_data_ptr());
  fill_zero(counts, static_cast<int64_t>(n), stream);

  for (const GroupKind kind : {GroupKind::kFour, GroupKind::kEight, GroupKind::kWarp, GroupKind::kRow}) {
    std::vector<GroupRow> rows;
    int64_t tiles = 0;
    for (size_t i = 0; i < n; ++i) {
      if (weights[i].numel() == 0) continue;
      GroupRow row = group_row(weights[i], masks[i], factors[i], bases[i], sizes[i], kept[i], row_dims[i]);
      if (kind_of(row.size) != kind) continue;
      row.tensor = static_cast<int32_t>(i);
      row.first_tile = tiles;
      tiles += (row.groups + groups_in_tile(kind) - 1) / groups_in_tile(kind);
      rows.push_back(row);
    }
    if (rows.empty()) continue;
    const DeviceArray<GroupRow> there(weights[0], static_cast<int64_t>(rows.size()));
    upload(rows, there.data, stream);
    const GroupTable table{there.data,
                           static_cast<int32_t>(rows.size()),
                           tiles,
                           uploaded.table,
                           any_base ? uploaded_bases->table : TensorTable{},
                           counts};
    launch_group_masks(kind, table, stream);
  }
  return nonfinite;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("group_masks", TORCH_BOX(&pyprune::group_masks));
}
