// masks[i] = keep, where exactly the removed[g] smallest scores of group g are dropped: |w| or |w| * scales[i].
//
// Scores become unsigned keys of the same order: their bits without the sign (31 bits as float32; 63 as float64 when
// a weight of the list is float64). A radix select finds the key T of the last score to drop, from the top digit
// down: a histogram of the digit over the keys that match so far, then a choice of the digit, in one launch each. The
// mask pass keeps keys >= T and counts those equal to T per tile. Of these the first in (tensor, index) order go: a
// scan over the tiles' counts finds where they end, a patch pass revisits the tiles that hold them. No patch is
// needed when all keys equal to T go (the rule for float32), for T is then raised by one.
//
// Layout: any strides of weights and masks. Histograms read dense weights in memory order, 16 bytes at a time; the
// mask pass needs logical order (for the ties), so it walks linearly only where weights and masks are C-contiguous.
// Moves per element of b bytes: (digits + 1) * b + 1, with 3 digits for float32, 2 for float16 and bfloat16 without
// scales, 3 with, 6 for float64; plus b for each element of a patched tile.
// Counters are integers, added in any order: the masks are the same bits in every run.
#include "block_loop.cuh"
#include "radix_select.cuh"
#include "upload.cuh"

namespace pyprune {
namespace {

constexpr int64_t kHistogramBudget = int64_t{8} << 20;  // bytes for all groups, or 1 % of the weights
constexpr int kScanThreads = 1024;
constexpr int kTilesPerScanThread = 16;
constexpr uint32_t kAllTies = uint32_t{1} << 31;  // in a tile's record: all of its ties go

// ---- masks ----

// Writes a run's masks; returns how many of this thread's keys equal the selected one.
template <typename T, typename Scores>
__device__ __noinline__ int write_masks(const TableRow& row, const Layout* layout, const Run& run, double scale,
                                        uint64_t selected) {
  using Key = typename Scores::KeyType;
  using Bits = typename T::Bits;
  const Bits* const data = static_cast<const Bits*>(row.data);
  uint8_t* const mask = static_cast<uint8_t*>(row.partner);
  const Key key = static_cast<Key>(selected);
  int ties = 0;
  const auto load = [&](auto width, int64_t at) {
    constexpr int kWidth = decltype(width)::value;
    return load_pack<kWidth>(data + (kWidth == 1 ? offsets_of(layout, at).data : at));
  };
  const auto use = [&](auto width, int64_t at, const auto& pack) {
    constexpr int kWidth = decltype(width)::value;
    Pack<uint8_t, kWidth> keep{};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Key score = Scores::template key<T>(pack.get(i), scale);
      keep.set_in_zeros(i, score >= key ? 1 : 0);
      ties += score == key ? 1 : 0;
    }
    store_pack(mask + (kWidth == 1 ? offsets_of(layout, at).partner : at), keep);
  };
  visit<Bits>(make_span(data, mask, layout == nullptr, run.begin, run.end), load, use);
  return ties;
}

// Masks with all ties kept, and the ties of each tile (ties[] arrives zero) of groups that drop some of them.
template <typename Scores>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    mask_kernel(TensorTable table, Scores scores, const Selection* selections, uint32_t* ties) {
  const TileRange tiles = tiles_of_block(table);
  for (int64_t tile = tiles.begin; tile < tiles.end;) {
    const Run all = run_at(table, tile, tiles.end);
    const TableRow& row = table.rows[all.tensor];
    const Layout* const layout = layout_of(table, row);
    const Selection selection = selections[scores.group(all.tensor)];
    const double scale = scores.scale(all.tensor);
    // Ties are counted per tile; without any to drop, the run is one span.
    for (Run run = all; run.begin < all.end; run.begin = run.end, ++tile) {
      if (selection.rank > 0) run.end = run.begin + kTile < all.end ? run.begin + kTile : all.end;
      int count = 0;
      with_weight_type<sizeof(typename Scores::KeyType) == 8>(row.dtype, [&](auto type) {
        count = write_masks<decltype(type), Scores>(row, layout, run, scale, selection.key);
      });
      if (selection.rank > 0) {
        count = warp_sum(count);
        if (threadIdx.x % 32 == 0 && count != 0) atomicAdd(&ties[tile], static_cast<uint32_t>(count));
      }
    }
    tile = all.next_tile;
  }
}

// Turns each tile's number of ties into how many of them go (| kAllTies if all do). One block per group.
__global__ void __launch_bounds__(kScanThreads)
    scan_ties_kernel(TensorTable table, bool per_tensor, const Selection* selections, uint32_t* ties) {
  const int64_t groups = per_tensor ? table.size : 1;
  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    int64_t rank = selections[group].rank;
    if (rank == 0) continue;
    const int64_t begin = per_tensor ? table.rows[group].first_tile : 0;
    const int64_t end = per_tensor ? begin + tiles_of(table.rows[group]) : table.tiles;
    for (int64_t chunk = begin; chunk < end; chunk += kScanThreads * kTilesPerScanThread) {
      const int64_t first = chunk + static_cast<int64_t>(threadIdx.x) * kTilesPerScanThread;
      uint32_t counts[kTilesPerScanThread];
      int64_t sum = 0;
#pragma unroll
      for (int i = 0; i < kTilesPerScanThread; ++i) {
        counts[i] = first + i < end ? ties[first + i] : 0;
        sum += counts[i];
      }
      const Scan scan = scan_block(sum);
      int64_t left = rank - scan.before;
#pragma unroll
      for (int i = 0; i < kTilesPerScanThread; ++i) {
        if (first + i < end && counts[i] != 0) {
          ties[first + i] = left >= counts[i] ? counts[i] | kAllTies : left > 0 ? static_cast<uint32_t>(left) : 0;
          left -= counts[i];
        }
      }
      rank -= scan.total;  // below zero once enough went
    }
  }
}

// Drops as many ties of a tile as its record says, in flat order. All threads of the block must call.
template <typename T, typename Scores>
__device__ __noinline__ void drop_ties(const TableRow& row, const Layout* layout, const Run& run, double scale,
                                       uint64_t selected, uint32_t record) {
  using Key = typename Scores::KeyType;
  const auto* const data = static_cast<const typename T::Bits*>(row.data);
  uint8_t* const mask = static_cast<uint8_t*>(row.partner);
  const Key key = static_cast<Key>(selected);
  int64_t left = record & ~kAllTies;
  for (int64_t first = run.begin; first < run.end && left > 0; first += kThreads) {
    const int64_t at = first + threadIdx.x;
    Offsets offsets{0, 0};
    bool tie = false;
    if (at < run.end) {
      offsets = offsets_of(layout, at);
      tie = Scores::template key<T>(data[offsets.data], scale) == key;
    }
    if ((record & kAllTies) != 0) {
      if (tie) mask[offsets.partner] = 0;
    } else {
      const Scan scan = scan_block(tie ? 1 : 0);
      if (tie && scan.before < left) mask[offsets.partner] = 0;
      left -= scan.total;
    }
  }
}

// Revisits the tiles that hold ties to drop. Blocks take turns of 32 tiles, whose records each warp reads at once.
template <typename Scores>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    patch_kernel(TensorTable table, Scores scores, const Selection* selections, const uint32_t* ties) {
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * 32; first < table.tiles;
       first += static_cast<int64_t>(gridDim.x) * 32) {
    const int64_t mine = first + threadIdx.x % 32;
    const uint32_t record = mine < table.tiles ? ties[mine] : 0;
    // The same in all warps, so that the whole block goes from tile to tile.
    for (unsigned todo = __ballot_sync(kWholeWarp, record != 0); todo != 0; todo &= todo - 1) {
      const int turn = __ffs(static_cast<int>(todo)) - 1;
      const Run run = run_at(table, first + turn, first + turn + 1);
      const TableRow& row = table.rows[run.tensor];
      const uint32_t drop = __shfl_sync(kWholeWarp, record, turn);
      with_weight_type<sizeof(typename Scores::KeyType) == 8>(row.dtype, [&](auto type) {
        drop_ties<decltype(type), Scores>(row, layout_of(table, row), run, scores.scale(run.tensor),
                                          selections[scores.group(run.tensor)].key, drop);
      });
    }
  }
}

// ---- launches ----

struct Workspace {
  Selection* selections;
  int64_t groups;
  int digit_bits;  // at most
  Count* histograms;
  uint32_t* ties;
  int64_t* nonfinite;
};

// key_bits above low_zeros decide; the bits below them are zero in all keys.
template <typename Scores>
void launch_all(const TensorTable& table, const Scores& scores, int key_bits, int low_zeros, const Workspace& work,
                int64_t blocks, cudaStream_t stream) {
  if (blocks == 0) return;
  const int64_t group_blocks = std::min<int64_t>(work.groups, 65535);
  int64_t* nonfinite = work.nonfinite;
  for (int top = key_bits; top > low_zeros;) {
    const int bits = std::min(work.digit_bits, top - low_zeros);
    top -= bits;
    const Digit digit{top, bits, top == low_zeros};
    launch(&histogram_kernel<Scores>, blocks, kThreads, stream, table, scores, digit, work.selections,
           work.histograms, nonfinite);
    launch(&select_kernel, group_blocks, kThreads, stream, work.groups, digit, work.selections, work.histograms);
    nonfinite = nullptr;
  }
  launch(&mask_kernel<Scores>, blocks, kThreads, stream, table, scores, work.selections, work.ties);
  launch(&scan_ties_kernel, group_blocks, kScanThreads, stream, table, scores.per_tensor, work.selections, work.ties);
  launch(&patch_kernel<Scores>, blocks, kThreads, stream, table, scores, work.selections, work.ties);
}

Tensor threshold(const std::vector<Tensor>& weights, const std::optional<Tensor>& scales,
                 const std::vector<int64_t>& removed, const std::vector<Tensor>& masks) {
  const int64_t count = static_cast<int64_t>(weights.size());
  const int64_t groups = static_cast<int64_t>(removed.size());
  STD_TORCH_CHECK(count > 0, "threshold needs at least one weight");
  check_masks(masks, weights);
  STD_TORCH_CHECK(groups == 1 || groups == count, "threshold needs one count, or one per weight");
  const int32_t device = weights[0].get_device_index();
  const bool per_tensor = groups == count;  // for a single tensor both mean the same
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += weights[i].numel();
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t limit = per_tensor ? weights[group].numel() : total;
    STD_TORCH_CHECK(0 <= removed[group] && removed[group] <= limit, "cannot remove ", removed[group], " of ", limit);
  }
  STD_TORCH_CHECK(!scales.has_value() ||
                      (scales->is_cuda() && scales->get_device_index() == device &&
                       scales->scalar_type() == ScalarType::Double && scales->dim() == 1 && scales->numel() == count),
                  "threshold needs one float64 scale per weight, on the weights' device");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(weights[0]);

  const UploadedTable uploaded(weights, &masks, Order::kLogical, Writes::kPartners, stream);
  const TensorTable& table = uploaded.table;
  int low_zeros = 16;  // of a float32 key: bfloat16 leaves 16 bits zero, float16 13
  bool wide = false;
  int64_t weight_bytes = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const TableRow& row = uploaded.host_rows[i];
    weight_bytes += row.numel * static_cast<int64_t>(weights[i].element_size());
    wide = wide || row.dtype == Dtype::kFloat64;
    if (row.dtype != Dtype::kBFloat16) low_zeros = std::min(low_zeros, row.dtype == Dtype::kFloat16 ? 13 : 0);
  }
  if (wide || scales.has_value()) low_zeros = 0;

  Tensor nonfinite = new_vector(weights[0], count, ScalarType::Long);
  int digit_bits = kDigitBits;
  const int64_t budget = std::max(kHistogramBudget, weight_bytes / 100);
  while (digit_bits > 4 && groups * static_cast<int64_t>(sizeof(Count)) << digit_bits > budget) --digit_bits;
  const DeviceArray<Selection> selections(weights[0], groups);
  const DeviceArray<Count> histograms(weights[0], groups << digit_bits);
  const DeviceArray<uint32_t> ties(weights[0], table.tiles);
  const Workspace work{selections.data, groups,    digit_bits,
                       histograms.data, ties.data, static_cast<int64_t*>(nonfinite.mutable_data_ptr())};
  std::vector<Selection> start;
  for (const int64_t rank : removed) start.push_back({0, rank});
  upload(start, work.selections, stream);
  fill_zero(work.histograms, groups << digit_bits, stream);
  fill_zero(work.ties, table.tiles, stream);
  fill_zero(work.nonfinite, count, stream);

  const double* const scale = scales.has_value() ? static_cast<const double*>(scales->const_data_ptr()) : nullptr;
  const int64_t stride = scales.has_value() ? scales->stride(0) : 0;
  const int64_t blocks = blocks_for(table.tiles, device);
  const auto run = [&](auto scores, int key_bits) {
    launch_all(table, scores, key_bits, low_zeros, work, blocks, stream);
  };
  if (wide) {
    scale == nullptr ? run(Scores<uint64_t, false>{scale, stride, per_tensor}, 63)
                     : run(Scores<uint64_t, true>{scale, stride, per_tensor}, 63);
  } else {
    scale == nullptr ? run(Scores<uint32_t, false>{scale, stride, per_tensor}, 31)
                     : run(Scores<uint32_t, true>{scale, stride, per_tensor}, 31);
  }
  return nonfinite;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("threshold", TORCH_BOX(&pyprune::threshold));
}
