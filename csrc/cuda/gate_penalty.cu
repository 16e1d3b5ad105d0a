// penalty[i] = the number of logits[i] above 0, or the sum of sigma(logits[i] + shift), in float64; and the gradient
// of the sum, grad[i] * sigma'(logits[i] + shift).
//
// One warp sums a tile, each lane every 32nd element in order, then lanes are added in halves; one block per tensor
// sums the tiles in the same way. So the order depends on the number of elements alone.
// Layout: any strides. Sums take elements in logical order, gradients as they lie in memory, 16 bytes at a time where
// logits and gradient lie alike. Moves per logit: its own size for the sum, twice that for the gradient.
#include "../gate_math.h"
#include "kernels/block_loop.cuh"
#include "upload.cuh"

namespace pyprune {
namespace {

constexpr int kLanes = 32;
constexpr int kStepsInFlight = 8;
constexpr int kPacksInFlight = 2;  // what registers can hold beside the arithmetic
constexpr int kFinishThreads = 512;

template <class Real>
__device__ inline Odds<Real> open_odds(Real logit, Real shift) {
  return Odds<Real>(exponential(within_range(logit + shift)), Real(1));
}

template <typename T>
__device__ inline double lane_sum(const TableRow& row, const Layout* layout, const Run& run, bool hard,
                                  double shift) {
  using Value = typename T::Value;
  const auto* const data = static_cast<const typename T::Bits*>(row.data);
  const int lane = threadIdx.x % kLanes;
  double sum = 0;
#pragma unroll 1
  for (int64_t first = run.begin + lane; first < run.end; first += kStepsInFlight * kLanes) {
    typename T::Bits logits[kStepsInFlight];
#pragma unroll
    for (int step = 0; step < kStepsInFlight; ++step) {
      const int64_t at = first + step * kLanes;
      if (at < run.end) logits[step] = data[offsets_of(layout, at).data];
    }
#pragma unroll
    for (int step = 0; step < kStepsInFlight; ++step) {
      if (first + step * kLanes >= run.end) break;
      const Value logit = T::value(logits[step]);
      sum += hard ? (logit > Value(0) ? 1.0 : 0.0) : open_odds(logit, static_cast<Value>(shift)).one;
    }
  }
  return sum;
}

// Launched once for each element type of the list, so that each gets its own registers.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sum_tiles_kernel(TensorTable table, bool hard, double shift, double* sums) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kLanes);
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  for (int64_t tile = warp; tile < table.tiles; tile += warps) {
    const Run run = run_at(table, tile, tile + 1);
    const TableRow& row = table.rows[run.tensor];
    if (row.dtype != T::kDtype) continue;
    const double sum = warp_sum(lane_sum<T>(row, layout_of(table, row), run, hard, shift));
    if (threadIdx.x % kLanes == 0) sums[tile] = sum;
  }
}

__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(TensorTable table, const double* sums, double* penalties) {
  constexpr int kWarps = kFinishThreads / kLanes;
  __shared__ double of_warps[kWarps];
  for (int32_t tensor = blockIdx.x; tensor < table.size; tensor += gridDim.x) {
    const TableRow& row = table.rows[tensor];
    const int64_t count = tiles_of(row);
    double sum = 0;
    for (int64_t tile = threadIdx.x; tile < count; tile += kFinishThreads) sum += sums[row.first_tile + tile];
    sum = warp_sum(sum);
    if (threadIdx.x % kLanes == 0) of_warps[threadIdx.x / kLanes] = sum;
    __syncthreads();
    if (threadIdx.x < kLanes) {
      sum = warp_sum(threadIdx.x < kWarps ? of_warps[threadIdx.x] : 0);
      if (threadIdx.x == 0) penalties[tensor] = sum;
    }
    __syncthreads();  // the next tensor writes of_warps again
  }
}

template <typename T>
__device__ inline void write_gradients(const TableRow& row, const Layout* layout, const Run& run, double grad,
                                       double shift) {
  using Bits = typename T::Bits;
  using Value = typename T::Value;
  const Bits* const logits = static_cast<const Bits*>(row.data);
  Bits* const gradients = static_cast<Bits*>(row.partner);
  const auto load = [&](auto width, int64_t at) {
    constexpr int kWidth = decltype(width)::value;
    return load_pack<kWidth>(logits + (kWidth == 1 ? offsets_of(layout, at).data : at));
  };
  const auto use = [&](auto width, int64_t at, const auto& pack) {
    constexpr int kWidth = decltype(width)::value;
    Pack<Bits, kWidth> result{};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Odds<Value> odds = open_odds(T::value(pack.get(i)), static_cast<Value>(shift));
      result.set_in_zeros(i, T::bits(static_cast<Value>(grad) * (odds.one * odds.other)));
    }
    store_pack(gradients + (kWidth == 1 ? offsets_of(layout, at).partner : at), result);
  };
  visit<Bits, kPacksInFlight>(make_span(logits, gradients, layout == nullptr, run.begin, run.end), load, use);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    gradient_kernel(TensorTable table, const double* grads, int64_t grad_stride, double shift) {
  const TileRange tiles = tiles_of_block(table);
  for (int64_t tile = tiles.begin; tile < tiles.end;) {
    const Run run = run_at(table, tile, tiles.end);
    const TableRow& row = table.rows[run.tensor];
    if (row.dtype == T::kDtype) {
      write_gradients<T>(row, layout_of(table, row), run, grads[run.tensor * grad_stride], shift);
    }
    tile = run.next_tile;
  }
}

// Calls use(T{}) for each element type in the list.
template <typename Use>
void for_each_type(const std::vector<TableRow>& rows, const Use& use) {
  const auto use_if_there = [&](auto type) {
    if (std::any_of(rows.begin(), rows.end(),
                    [](const TableRow& row) { return row.dtype == decltype(type)::kDtype; })) {
      use(type);
    }
  };
  use_if_there(Float32{});
  use_if_there(Float64{});
  use_if_there(Float16{});
  use_if_there(BFloat16{});
}

Tensor gate_penalty(const std::vector<Tensor> logits, bool hard, double shift) {
  STD_TORCH_CHECK(!logits.empty(), "gate_penalty needs at least one tensor");
  check_weights(logits);
  const int32_t device = logits[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(logits[0]);
  const int64_t count = static_cast<int64_t>(logits.size());
  Tensor penalties = new_vector(logits[0], count, ScalarType::Double);

  const UploadedTable uploaded(logits, nullptr, Order::kLogical, Writes::kNothing, stream);
  const TensorTable& table = uploaded.table;
  const DeviceArray<double> sums(logits[0], table.tiles);
  const int64_t warps_per_block = kThreads / kLanes;
  const int64_t blocks = blocks_for((table.tiles + warps_per_block - 1) / warps_per_block);
  for_each_type(uploaded.host_rows, [&](auto type) {
    if (blocks > 0)
      launch(&sum_tiles_kernel<decltype(type)>, blocks, kThreads, stream, table, hard, shift, sums.data);
  });
  launch(&finish_kernel, std::min<int64_t>(count, 65535), kFinishThreads, stream, table, sums.data,
         static_cast<double*>(penalties.mutable_data_ptr()));
  return penalties;
}

std::vector<Tensor> gate_penalty_backward(const Tensor grad, const std::vector<Tensor> logits, double shift) {
  check_weights(logits);
  std::vector<Tensor> gradients;
  if (logits.empty()) return gradients;
  const int32_t device = logits[0].get_device_index();
  STD_TORCH_CHECK(grad.is_cuda() && grad.get_device_index() == device && grad.scalar_type() == ScalarType::Double &&
                      grad.dim() == 1 && grad.numel() == static_cast<int64_t>(logits.size()),
                  "gate_penalty_backward needs one float64 gradient per tensor, on their device");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(logits[0]);
  for (const Tensor& one : logits) gradients.push_back(torch::stable::empty_like(one));

  const UploadedTable uploaded(logits, &gradients, Order::kAny, Writes::kPartners, stream);
  const int64_t blocks = blocks_for(uploaded.table.tiles);
  const auto* const grads = static_cast<const double*>(grad.const_data_ptr());
  for_each_type(uploaded.host_rows, [&](auto type) {
    if (blocks > 0) {
      launch(&gradient_kernel<decltype(type)>, blocks, kThreads, stream, uploaded.table, grads, grad.stride(0),
             shift);
    }
  });
  return gradients;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("gate_penalty", TORCH_BOX(&pyprune::gate_penalty));
  m.impl("gate_penalty_backward", TORCH_BOX(&pyprune::gate_penalty_backward));
}
