// Microbenchmarks of the CUDA kernels, without torch (make bench-cuda): from a million elements to what fits.
//
//   kernels_bench_cuda [MOST ELEMENTS]
#include <array>
#include <cstdlib>

#include "../cuda/kernels/count_zeros.cuh"
#include "../cuda/kernels/fold.cuh"
#include "../cuda/kernels/gate.cuh"
#include "../cuda/kernels/gate_backward.cuh"
#include "../cuda/kernels/gate_noise.cuh"
#include "../cuda/kernels/gate_penalty.cuh"
#include "../cuda/kernels/norms.cuh"
#include "../cuda/kernels/shared_gate_backward.cuh"
#include "../cuda/kernels/shared_gates.cuh"
#include "../cuda/kernels/threshold.cuh"
#include "bench.cuh"

namespace pyprune::bench {
namespace {

constexpr int64_t kSmallest = int64_t{1} << 20, kLargest = int64_t{1} << 32;
constexpr int kTensors = 16;
constexpr double kRatio = 0.7;
constexpr int64_t kRow = 1024;  // weights of a shared gate

template <class T>
__global__ void fill_normal(typename T::Bits* values, int64_t count) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += threads) {
    const PhiloxBlock block = philox(1, 0, static_cast<uint64_t>(i));
    const float radius = sqrtf(-2 * logf(uniform<float>(block.words[0])));
    values[i] = T::bits(radius * cosf(6.2831853f * uniform<float>(block.words[1])));
  }
}

// A tensor in equal parts, and another one with as many elements as partner.
struct List {
  std::vector<TableRow> rows;
  DeviceMemory room{kTensors * sizeof(TableRow)};
  TensorTable table;

  template <class Partner>
  List(Dtype dtype, void* data, Partner* partner, int64_t count) {
    const int64_t each = count / kTensors;
    for (int64_t i = 0; i < kTensors; ++i) {
      TableRow row{};
      row.data = static_cast<char*>(data) + i * each * item_size(dtype);
      row.partner = partner + i * each;
      row.numel = each;
      row.first_tile = i * tiles_of(row);
      row.first_element = i * each;
      row.layout = -1;
      row.dtype = dtype;
      row.contiguous = row.dense = true;
      rows.push_back(row);
    }
    upload(rows, room.as<TableRow>(), nullptr);
    table = {room.as<TableRow>(), nullptr, kTensors, kTensors * tiles_of(rows[0])};
  }
};

template <class T>
class Jobs {
 public:
  Jobs(const char* dtype, int64_t count)
      : count_(count),
        weights_(count * sizeof(Bits)),
        gradients_(count * sizeof(Bits)),
        outputs_(count * sizeof(Bits)),
        logits_(count * sizeof(float)),
        grad_logits_(count * sizeof(float)),
        masks_(count),
        masked_(T::kDtype, weights_.as<void>(), masks_.as<uint8_t>(), count),
        table_(dtype, count) {
    fill<T>(weights_);
    fill<T>(gradients_);
    fill<Float32>(logits_);
    const int64_t seed = -7;
    check_cuda(cudaMemcpy(seed_.as<int64_t>(), &seed, sizeof(seed), cudaMemcpyHostToDevice));
  }

  void run() {
    const double n = static_cast<double>(count_);
    table_.add("copy on the device", 2 * kSize * n, [&] {
      check_cuda(cudaMemcpyAsync(outputs_.as<void>(), weights_.as<void>(), count_ * kSize, cudaMemcpyDeviceToDevice));
    });
    thresholds();
    table_.add("count_zeros of masks", n, [&, zeros = numbers_.as<int64_t>()] {
      const List masks(Dtype::kBool, masks_.as<void>(), masks_.as<uint8_t>(), count_);
      launch_count_zeros(masks.table, zeros, nullptr);
    });
    gates();
    // Last, as it changes the weights.
    table_.add("fold", (2 * kSize + 1) * n, [&] { launch_fold(masked_.table, nullptr); });
  }

 private:
  using Bits = typename T::Bits;
  static constexpr int64_t kSize = sizeof(Bits);

  template <class Kind>
  void fill(const DeviceMemory& memory) {
    launch(&fill_normal<Kind>, blocks_for(count_ / kThreads), kThreads, nullptr, memory.as<typename Kind::Bits>(),
           count_);
  }

  void thresholds() {
    const double n = static_cast<double>(count_);
    const NormsRoom norms(masked_.table, false);
    const DeviceMemory sums(norms.sums * sizeof(double)), scratch(norms.scratch * sizeof(double));
    double* const scales = numbers_.as<double>();
    table_.add("norms", kSize * n,
               [&] { launch_norms(masked_.table, norms, sums.as<double>(), scratch.as<double>(), scales, nullptr); });
    // Norms stand in for their reciprocals: nearly equal, and any scale will do.
    const std::vector<int64_t> all{static_cast<int64_t>(kRatio * n)};
    const std::vector<int64_t> each(kTensors, static_cast<int64_t>(kRatio * n / kTensors));
    add_threshold("threshold, all tensors", all, scales, false, 0);
    add_threshold("threshold, all tensors, scaled", all, scales, true, 0);
    add_threshold("threshold, all tensors, bracket missed", all, scales, false, 50);
    add_threshold("threshold, each tensor", each, scales, false, 0);
  }

  void add_threshold(const char* name, const std::vector<int64_t>& removed, const double* scales, bool scaled,
                     double shift) {
    const ThresholdPlan plan(masked_.rows, removed, scaled, shift);
    const DeviceMemory room(ThresholdMemory(plan, masked_.table).bytes);
    const ThresholdMemory memory(plan, masked_.table, room.as<char>());
    const DeviceMemory nonfinite(kTensors * sizeof(int64_t));
    check_cuda(cudaMemset(nonfinite.as<void>(), 0, kTensors * sizeof(int64_t)));
    table_.add(name, (kSize + 1) * static_cast<double>(count_), [&] {
      launch_threshold(masked_.table, plan, memory, removed, scaled ? scales : nullptr, 1, nonfinite.as<int64_t>(),
                       nullptr);
    });
    const DeviceMemory zeros(kTensors * sizeof(int64_t));
    check_cuda(cudaMemset(zeros.as<void>(), 0, kTensors * sizeof(int64_t)));
    const List masks(Dtype::kBool, masks_.as<void>(), masks_.as<uint8_t>(), count_);
    launch_count_zeros(masks.table, zeros.as<int64_t>(), nullptr);
    int64_t wanted = 0, got = 0;
    for (const int64_t one : removed) wanted += one;
    for (const int64_t one : fetch(zeros.as<int64_t>(), kTensors)) got += one;
    if (wanted != got) {
      throw std::runtime_error(std::string(name) + " dropped " + std::to_string(got) + " of " +
                               std::to_string(count_) + ", not " + std::to_string(wanted));
    }
  }

  void gates() {
    const double n = static_cast<double>(count_);
    const Noise noise{seed_.as<int64_t>(), 1};
    const Bits* const weights = weights_.as<Bits>();
    const auto* const logit_bits = logits_.as<uint32_t>();
    const Gradients<T, Float32> gradients{gradients_.as<Bits>(), weights, outputs_.as<Bits>(),
                                          grad_logits_.as<uint32_t>()};
    table_.add("gate_noise", 4 * n,
               [&] { launch_gate_noise(noise.seed, noise.stream, count_, grad_logits_.as<float>(), nullptr); });
    for (const auto& [name, rule] :
         {std::pair{"Bernoulli", GateRule::kBernoulli}, std::pair{"hard concrete", GateRule::kHardConcrete}}) {
      const Gate gate{rule, true, kUsualBeta, -0.1, 1.1};
      table_.add(std::string("gate forward, ") + name, (2 * kSize + 4) * n, [&] {
        launch_gate<T, Float32>(gate, noise, count_, linear<4>(), weights, logit_bits, outputs_.as<Bits>(), nullptr);
      });
      table_.add(std::string("gate backward, ") + name, (3 * kSize + 8) * n,
                 [&] { launch_gate_backward(gate, noise, count_, linear<6>(), gradients, logit_bits, nullptr); });
    }
    shared_gates(gradients, noise);

    const List penalised(Dtype::kFloat32, logits_.as<void>(), grad_logits_.as<float>(), count_);
    const DeviceMemory sums(penalised.table.tiles * sizeof(double));
    double* const numbers = numbers_.as<double>();
    table_.add("gate_penalty", 4 * n, [&] {
      launch_gate_penalty(penalised.table, penalised.rows, false, 0.5, sums.as<double>(), numbers, nullptr);
    });
    table_.add("gate_penalty backward", 8 * n,
               [&] { launch_gate_penalty_backward(penalised.table, penalised.rows, numbers, 1, 0.5, nullptr); });
  }

  // One gate for each row of kRow weights.
  void shared_gates(const Gradients<T, Float32>& tensors, const Noise& noise) {
    const double n = static_cast<double>(count_);
    const int64_t rows = count_ / kRow;
    const Gate gate{GateRule::kHardConcrete, true, kUsualBeta, -0.1, 1.1};
    const DeviceMemory z(rows * sizeof(float)), slope(rows * sizeof(float));
    Loops<1> logits;
    logits.add(rows, {1});
    Loops<3> weights_and_z, inner;
    weights_and_z.add(rows, {kRow, kRow, 1});
    weights_and_z.add(kRow, {1, 1, 0});
    inner.add(kRow, {1, 1, 1});
    Loops<4> outer;
    outer.add(rows, {kRow, kRow, kRow, 1});
    const LoopNest<3> inner_nest = inner.nest(Order::kLogical);
    const SharedSums plan(rows, rows * kRow, kRow, inner_nest);
    const DeviceMemory sums(2 * plan.room * static_cast<int64_t>(sizeof(double)));
    const auto values = [&](float* slopes) {
      launch_gate_values<Float32>(gate, noise, rows, logits.nest(Order::kLogical), logits_.as<uint32_t>(),
                                  z.as<float>(), slopes, nullptr);
    };
    table_.add("gate forward, one per row", 2 * kSize * n, [&] {
      values(nullptr);
      launch_multiply<T>(rows * kRow, weights_and_z.nest(Order::kAny), tensors.weight, tensors.grad_weight,
                         z.as<float>(), nullptr);
    });
    table_.add("gate backward, one per row", 3 * kSize * n, [&] {
      values(slope.as<float>());
      launch_shared_gate_backward(plan, outer.nest(Order::kLogical), inner_nest, tensors, z.as<float>(),
                                  slope.as<float>(), sums.as<double>(), nullptr);
    });
  }

  template <int kTensorsOfNest>
  LoopNest<kTensorsOfNest> linear() const {
    Loops<kTensorsOfNest> loops;
    std::array<int64_t, kTensorsOfNest> ones;
    ones.fill(1);
    loops.add(count_, ones);
    return loops.nest(Order::kAny);
  }

  int64_t count_;
  DeviceMemory weights_, gradients_, outputs_, logits_, grad_logits_, masks_;
  DeviceMemory seed_{sizeof(int64_t)};
  DeviceMemory numbers_{kTensors * sizeof(double)};
  List masked_;
  Table table_;
};

template <class T>
void run_if_it_fits(const char* dtype, int64_t count) {
  size_t free = 0, total = 0;
  check_cuda(cudaMemGetInfo(&free, &total));
  const int64_t needed = count * static_cast<int64_t>(3 * sizeof(typename T::Bits) + 2 * sizeof(float) + 2);
  if (needed > static_cast<int64_t>(free)) {
    std::printf("\n%s, %lld elements: left out, needs %.0f GB\n", dtype, static_cast<long long>(count), needed / 1e9);
    return;
  }
  Jobs<T>(dtype, count).run();
}

void run_all(int64_t most) {
  cudaDeviceProp device{};
  check_cuda(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  for (int64_t count = kSmallest; count <= most; count *= 8) {
    run_if_it_fits<Float32>("float32", count);
    run_if_it_fits<BFloat16>("bfloat16", count);
  }
}

}  // namespace
}  // namespace pyprune::bench

int main(int argc, char** argv) {
  const long long most = argc > 1 ? std::atoll(argv[1]) : pyprune::bench::kLargest;
  if (argc > 2 || most < pyprune::bench::kSmallest) {
    std::fprintf(stderr, "usage: %s [MOST ELEMENTS, at least %lld]\n", argv[0],
                 static_cast<long long>(pyprune::bench::kSmallest));
    return 2;
  }
  try {
    pyprune::bench::run_all(most);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
