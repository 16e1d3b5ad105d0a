#include "../unit_dims.h"
#include "../unit_schema.h"
#include "kernels/loop_nest.cuh"
#include "kernels/unit_scores.cuh"
#include "upload.cuh"

namespace pyprune {
namespace {

// A tensor on its way through the stages.
struct Summed {
  Tensor tensor;  // or the copy that is read instead
  Tensor scores;
  const void* data;
  Dtype dtype;
  UnitTerm term;
  UnitPower of_maximum;  // and its power, for the last stage
  double p;
  double divisor;             // for the scores
  int32_t counts;             // what divides them where that is 0
  std::vector<UnitDim> dims;  // in the order of unit_order.h; what was summed has blocks of one
  size_t next;                // the one to be summed now

  bool done() const { return next == dims.size(); }
};

Layout layout_of(const Loops<2>& loops) {
  const LoopNest<2> nest = loops.nest(Order::kAny);
  STD_TORCH_CHECK(nest.loops <= kMaxDims, "a tensor has ", nest.loops, " dimensions of units that cannot be joined; ",
                  kMaxDims, " are supported: call .contiguous() on it first");
  Layout layout{};
  layout.dims = nest.loops;
  layout.narrow = nest.narrow ? 1 : 0;
  std::copy_n(nest.sizes, nest.loops, layout.sizes);
  std::copy_n(nest.strides[0], nest.loops, layout.strides);
  std::copy_n(nest.strides[1], nest.loops, layout.partner_strides);
  return layout;
}

// The next stage of a tensor, and how its items lie; `out` and places in tables are not set yet.
UnitStage next_stage(const Summed& summed, Layout& layout) {
  const UnitDim& dim = summed.dims[summed.next];
  UnitStage stage{};
  stage.data = summed.data;
  stage.dtype = summed.dtype;
  stage.term = summed.term;
  stage.size = dim.size;
  stage.block = dim.block;
  stage.units = dim.units();
  stage.row_stride = dim.stride;
  stage.behind = 1;
  for (size_t d = summed.next + 1; d < summed.dims.size(); ++d) stage.behind *= summed.dims[d].size;
  const int64_t lanes = unit_lanes(dim.block, stage.behind);
  stage.by_lanes = lanes > 1;
  stage.pieces = unit_pieces(dim.block, stage.behind);
  stage.rows_of_piece = stage.pieces > 1 ? kUnitSteps * lanes : dim.block;

  Loops<2> loops;
  stage.items = 1;
  const auto add = [&](int64_t size, int64_t stride) {
    loops.add(size, {stride, stage.items});
    stage.items *= size;
  };
  for (size_t d = summed.dims.size(); d-- > 0;) {
    if (d == summed.next) {
      add(stage.pieces, stage.rows_of_piece * dim.stride);
      add(stage.units, dim.block * dim.stride);
    } else {
      add(summed.dims[d].size, summed.dims[d].stride);
    }
  }
  std::reverse(loops.loops.begin(), loops.loops.end());
  layout = layout_of(loops);
  return stage;
}

// What is left of a tensor after a stage, whose sums lie at `sums`: pieces of the same dimension, or later
// dimensions.
void advance(Summed& summed, const UnitStage& stage, const double* sums) {
  summed.data = sums;
  summed.dtype = Dtype::kFloat64;
  summed.term = summed.term.of_sums();
  summed.dims[summed.next] = {stage.units, 1, 0};
  ++summed.next;
  if (stage.pieces > 1) {
    summed.dims.insert(summed.dims.begin() + summed.next, {stage.pieces, stage.pieces, 0});
  }
  while (!summed.done() && summed.dims[summed.next].block == 1) ++summed.next;
  int64_t stride = 1;
  for (size_t d = summed.dims.size(); d-- > 0; stride *= summed.dims[d].size) summed.dims[d].stride = stride;
}

Summed begin(const Tensor& given, const int64_t* block, const UnitTerm& term, bool mean,
             std::vector<UnitCounts>& counts) {
  Summed summed{};
  summed.scores = new_scores(given, block);
  summed.tensor = given;
  UnitDims dims(given.sizes().data(), given.strides().data(), block, given.dim());
  if (!dims.as_they_lie) {
    summed.tensor = torch::stable::contiguous(given);
    dims = UnitDims(given.sizes().data(), summed.tensor.strides().data(), block, given.dim());
  }
  summed.data = summed.tensor.const_data_ptr();
  summed.dtype = dtype_of(given);
  summed.term = term;
  summed.of_maximum = term.maximum ? term.power : UnitPower::kSigned;
  summed.p = term.p;
  summed.dims = dims.dims;
  summed.next = given.numel() == 0 ? dims.dims.size() : dims.first_summed();
  summed.divisor = 1;
  if (mean) {
    STD_TORCH_CHECK(dims.dims.size() <= kMaxDims, "units have at most ", kMaxDims, " dimensions of more than one");
    UnitCounts count{};
    for (const UnitDim& dim : dims.dims) {
      count.sizes[count.dims] = dim.size;
      count.blocks[count.dims++] = dim.block;
      summed.divisor = dim.size % dim.block == 0 ? summed.divisor * static_cast<double>(dim.block) : 0.0;
    }
    summed.counts = static_cast<int32_t>(counts.size());
    counts.push_back(count);
  }
  return summed;
}

// One stage of every tensor that is not done. Returns the sums, which the next one reads.
DeviceArray<double> run_stages(std::vector<Summed>& list, const UnitCounts* counts, cudaStream_t stream) {
  std::vector<UnitStage> stages;
  std::vector<Layout> layouts;
  int64_t tiles = 0, room = 0;
  for (const Summed& summed : list) {
    if (summed.done()) continue;
    layouts.emplace_back();
    UnitStage stage = next_stage(summed, layouts.back());
    stage.layout = static_cast<int32_t>(layouts.size()) - 1;
    stage.first_tile = tiles;
    tiles += (stage.items * (stage.by_lanes ? kUnitTeam : 1) + kThreads - 1) / kThreads;
    room += stage.items;
    stages.push_back(stage);
  }
  DeviceArray<double> sums(list[0].scores, room);
  double* out = sums.data;
  size_t at = 0;
  for (Summed& summed : list) {
    if (summed.done()) continue;
    UnitStage& stage = stages[at++];
    advance(summed, stage, out);
    stage.out = out;
    out += stage.items;
    stage.divisor = 1;
    stage.last = summed.done();
    if (stage.last) {
      stage.out = summed.scores.mutable_data_ptr();
      stage.wide = summed.scores.scalar_type() == ScalarType::Double;
      stage.divisor = summed.divisor;
      stage.counts = summed.counts;
      stage.of_maximum = summed.of_maximum;
      stage.p = summed.p;
    }
  }
  const DeviceArray<UnitStage> on_device(list[0].scores, static_cast<int64_t>(stages.size()));
  const DeviceArray<Layout> layouts_on_device(list[0].scores, static_cast<int64_t>(layouts.size()));
  upload(stages, on_device.data, stream);
  upload(layouts, layouts_on_device.data, stream);
  launch_sum_units({on_device.data, layouts_on_device.data, counts, static_cast<int32_t>(stages.size()), tiles},
                   stream);
  return sums;
}

std::vector<Tensor> unit_scores(const std::vector<Tensor>& tensors, const std::vector<int64_t>& blocks,
                                std::optional<double> p, int64_t reduction) {
  if (tensors.empty()) return {};
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  const cudaStream_t stream = current_stream(tensors[0]);
  std::vector<Summed> list;
  std::vector<UnitCounts> counts;
  std::vector<Tensor> scores;
  const int64_t* block = blocks.data();
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == tensors[0].get_device_index(),
                    "all tensors must be on one CUDA device");
    list.push_back(begin(tensor, block, unit_term(p, reduction), reduction == kMean, counts));
    scores.push_back(list.back().scores);
    block += tensor.dim();
  }
  const DeviceArray<UnitCounts> counts_on_device(tensors[0], static_cast<int64_t>(counts.size()));
  upload(counts, counts_on_device.data, stream);
  std::vector<DeviceArray<double>> sums;
  while (!std::all_of(list.begin(), list.end(), [](const Summed& summed) { return summed.done(); })) {
    sums.push_back(run_stages(list, counts_on_device.data, stream));
  }
  return scores;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("unit_scores", TORCH_BOX(&pyprune::unit_scores));
}
