// Ties that are counted per tile: the first of them, in (tensor, index) order, go. A scan over the tiles' counts
// finds where they end; the tiles whose provisional masks are wrong are read again.
#pragma once

#include "scores.cuh"

namespace pyprune {
namespace {

constexpr int kScanThreads = 1024;
constexpr int kTilesPerScanThread = 16;

// What becomes of a tile's ties: how many go, how many there are (at most kTile, 13 bits), and whether to visit it.
constexpr uint32_t kPatch = uint32_t{1} << 31;
constexpr int kTotalShift = 13;
constexpr uint32_t kNumber = (1u << kTotalShift) - 1;

// Turns each tile's counts into a record. One block per group.
__global__ void __launch_bounds__(kScanThreads)
    scan_ties_kernel(TensorTable table, bool per_tensor, const Ties* ties, uint32_t* tiles) {
  const int64_t groups = per_tensor ? table.size : 1;
  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    const Ties of_group = ties[group];
    if (of_group.settled) continue;
    int64_t going = of_group.going;
    const int64_t begin = per_tensor ? table.rows[group].first_tile : 0;
    const int64_t end = per_tensor ? begin + tiles_of(table.rows[group]) : table.tiles;
    for (int64_t chunk = begin; chunk < end; chunk += kScanThreads * kTilesPerScanThread) {
      const int64_t first = chunk + static_cast<int64_t>(threadIdx.x) * kTilesPerScanThread;
      int counts[kTilesPerScanThread];
      int64_t sum = 0;
#pragma unroll
      for (int i = 0; i < kTilesPerScanThread; ++i) {
        counts[i] = first + i < end ? static_cast<int>(tiles[first + i] >> of_group.half & 0xffff) : 0;
        sum += counts[i];
      }
      const Scan scan = scan_block(sum);
      int64_t left = going - scan.before;
#pragma unroll
      for (int i = 0; i < kTilesPerScanThread; ++i) {
        const uint32_t count = static_cast<uint32_t>(counts[i]);
        const uint32_t go = left >= counts[i] ? count : left > 0 ? static_cast<uint32_t>(left) : 0;
        const bool wrong = of_group.dropped ? go < count : go > 0;
        if (first + i < end) tiles[first + i] = (wrong ? kPatch : 0) | count << kTotalShift | go;
        left -= counts[i];
      }
      going -= scan.total;  // below zero once enough went
    }
  }
}

// Writes the masks of a tile's ties. All threads of the block must call.
template <typename T, typename Scores>
__device__ __noinline__ void settle_tile(const TableRow& row, const Layout* layout, const Run& run, double scale,
                                         uint64_t tied, uint32_t record) {
  using Key = typename Scores::KeyType;
  const auto* const data = static_cast<const typename T::Bits*>(row.data);
  uint8_t* const mask = static_cast<uint8_t*>(row.partner);
  const Key key = static_cast<Key>(tied);
  int64_t going = record & kNumber;
  const bool alike = going == 0 || going == (record >> kTotalShift & kNumber);
  for (int64_t first = run.begin; first < run.end; first += kThreads) {
    const int64_t at = first + threadIdx.x;
    Offsets offsets{0, 0};
    bool tie = false;
    if (at < run.end) {
      offsets = offsets_of(layout, at);
      tie = Scores::template key<T>(data[offsets.data], scale) == key &&
            (row.base == nullptr || row.base[offsets.partner] != 0);
    }
    if (alike) {
      if (tie) mask[offsets.partner] = going == 0 ? 1 : 0;
    } else {
      const Scan scan = scan_block(tie ? 1 : 0);
      if (tie) mask[offsets.partner] = scan.before < going ? 0 : 1;
      going -= scan.total;
    }
  }
}

// Visits the tiles whose masks are wrong. Blocks take turns of 32 tiles, whose records each warp reads at once.
template <typename Scores>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    settle_ties_kernel(TensorTable table, Scores scores, const Ties* ties, const uint32_t* tiles) {
  if (!scores.per_tensor && ties[0].settled) return;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * 32; first < table.tiles;
       first += static_cast<int64_t>(gridDim.x) * 32) {
    const int64_t mine = first + threadIdx.x % 32;
    const uint32_t record = mine < table.tiles ? tiles[mine] : 0;
    // The same in all warps, so that the whole block goes from tile to tile.
    for (unsigned todo = __ballot_sync(kWholeWarp, (record & kPatch) != 0); todo != 0; todo &= todo - 1) {
      const int turn = __ffs(static_cast<int>(todo)) - 1;
      const Run run = run_at(table, first + turn, first + turn + 1);
      const TableRow& row = table.rows[run.tensor];
      const uint32_t of_tile = __shfl_sync(kWholeWarp, record, turn);
      with_weight_type<Scores::kWide>(row.dtype, [&](auto type) {
        settle_tile<decltype(type), Scores>(row, layout_of(table, row), run, scores.scale(run.tensor),
                                            ties[scores.group(run.tensor)].key, of_tile);
      });
    }
  }
}

}  // namespace
}  // namespace pyprune
