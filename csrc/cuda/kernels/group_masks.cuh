// Masks that keep the largest scores of each group of neighbours in a row; of equal ones the last.
//
// Groups of up to 8 are ranked by a thread, of up to 64 by half a warp or a warp; a block searches the key that
// divides a longer one, digit by digit, reading it again for each: from the second-level cache, unless it is huge.
// Moves per element: the weight's size, 1 byte of mask, 1 byte of base if there is one. Packs of 16 bytes where
// columns are one after the other; rows that are neighbours in memory are met by neighbouring threads.
#pragma once

#include <cmath>

#include "block_loop.cuh"
#include "launch.cuh"

namespace pyprune {

constexpr int kRankedByThread = 8;
constexpr int kRankedByWarp = 64;

// A weight, cut into groups. Tiles are what a block works on at a time.
struct GroupRow {
  int64_t columns, size, kept;
  int64_t groups_in_row, groups;
  int64_t rows_together;  // so many rows take turns, and then their next group follows
  int64_t first_tile;
  const void* factors;  // null: none
  int64_t factor_stride;
  int64_t weight_step, mask_step, base_step;  // from one column to the next
  int32_t tensor;                             // row of the tensor tables
  bool has_steps;                             // otherwise columns are found by division
  bool has_base;
};

struct GroupTable {
  const GroupRow* rows;
  int32_t size;
  int64_t tiles;
  TensorTable weights;  // with the masks
  TensorTable bases;
  int64_t* nonfinite;
};

namespace {

// The score of an element as a signed integer of the same order; -1 where the base drops it.
template <typename T>
struct ScoreKey {
  using Bits = typename T::Bits;
  using Value = typename T::Value;
  using Key = std::conditional_t<sizeof(Bits) == 8, int64_t, int32_t>;
  static constexpr int kKeyBits = 8 * sizeof(Key) - 1;
  // Of the magnitude alone.
  static constexpr int kRawBits = 8 * sizeof(Bits) - 1;

  __device__ static Key of(Bits bits) { return static_cast<Key>(bits & kMagnitude<Bits>); }
  __device__ static Key of(Bits bits, Value factor) {
    const Value usable = factor >= 0 && factor < static_cast<Value>(HUGE_VAL) ? factor : 0;
    const Value score = T::value(bits) * usable;
    if constexpr (sizeof(Key) == 8) {
      return __double_as_longlong(score) & kMagnitude<uint64_t>;
    } else {
      return static_cast<Key>(__float_as_uint(score) & kMagnitude<uint32_t>);
    }
  }
};

// Not inlined: a division for each dimension, at every element, would be most of the code.
__device__ __noinline__ Offsets far_offsets(const Layout* layout, int64_t index) {
  return offsets_of(layout, index);
}

// One group, wherever its elements lie.
template <typename T>
struct Group {
  using Bits = typename T::Bits;
  using Value = typename T::Value;
  using Key = typename ScoreKey<T>::Key;

  const GroupRow& plan;
  const TableRow& row;
  const Layout* layout;
  const TableRow* base_row;
  const Layout* base_layout;
  int64_t flat;    // index of its first element in the tensor
  int64_t column;  // of its first element
  int64_t count;   // of its elements
  Offsets start;
  int64_t base_start;

  __device__ Group(const GroupTable& table, const GroupRow& plan, int64_t number)
      : plan(plan), row(table.weights.rows[plan.tensor]), layout(layout_of(table.weights, row)) {
    const int64_t groups_together = plan.rows_together * plan.groups_in_row;
    const int64_t block = divide(number, groups_together), in_block = number - block * groups_together;
    const int64_t group = divide(in_block, plan.rows_together);
    const int64_t row_number = block * plan.rows_together + (in_block - group * plan.rows_together);
    column = group * plan.size;
    count = plan.size < plan.columns - column ? plan.size : plan.columns - column;
    flat = row_number * plan.columns + column;
    start = far_offsets(layout, flat);
    base_row = plan.has_base ? table.bases.rows + plan.tensor : nullptr;
    base_layout = plan.has_base ? layout_of(table.bases, *base_row) : nullptr;
    base_start = plan.has_base ? far_offsets(base_layout, flat).data : 0;
  }

  __device__ const Bits* weight(int64_t i) const {
    return static_cast<const Bits*>(row.data) +
           (plan.has_steps ? start.data + i * plan.weight_step : far_offsets(layout, flat + i).data);
  }
  __device__ uint8_t* mask(int64_t i) const {
    return static_cast<uint8_t*>(row.partner) +
           (plan.has_steps ? start.partner + i * plan.mask_step : far_offsets(layout, flat + i).partner);
  }
  __device__ bool dropped(int64_t i) const {
    if (base_row == nullptr) return false;
    const int64_t at = plan.has_steps ? base_start + i * plan.base_step : far_offsets(base_layout, flat + i).data;
    return load_pack<1>(static_cast<const uint8_t*>(base_row->data) + at).get(0) == 0;
  }
  __device__ Key key(int64_t i, Bits bits) const {
    if (dropped(i)) return -1;
    if (plan.factors == nullptr) return ScoreKey<T>::of(bits);
    const Value* const factors = static_cast<const Value*>(plan.factors);
    return ScoreKey<T>::of(bits, factors[(column + i) * plan.factor_stride]);
  }
  __device__ static bool is_nonfinite(Bits bits) { return (bits & kMagnitude<Bits>) >= T::kInfinity; }
  // Whether columns lie one after the other.
  __device__ bool weights_in_a_row() const { return plan.has_steps && plan.weight_step == 1; }
  __device__ bool masks_in_a_row() const { return plan.has_steps && plan.mask_step == 1; }

 private:
  __device__ int64_t divide(int64_t number, int64_t by) const {
    return row.numel < (int64_t{1} << 32) ? static_cast<uint32_t>(number) / static_cast<uint32_t>(by) : number / by;
  }
};

template <typename Address>
__device__ inline bool aligned(const Address* address, size_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// Calls visit(row, first group, last group) for the tiles of this block.
template <int kGroups, typename Visit>
__device__ inline void for_each_tile(const GroupTable& table, const Visit& visit) {
  const TileRange tiles = share_of(table.tiles, blockIdx.x, gridDim.x);
  int32_t at = 0;
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    int32_t low = at, high = table.size;
    while (high - low > 1) {
      const int32_t middle = low + (high - low) / 2;
      if (table.rows[middle].first_tile <= tile) {
        low = middle;
      } else {
        high = middle;
      }
    }
    at = low;
    const GroupRow& row = table.rows[low];
    const int64_t begin = (tile - row.first_tile) * kGroups;
    visit(row, begin, begin + kGroups < row.groups ? begin + kGroups : row.groups);
  }
}

// --- groups of up to 8: a thread each
// ----------------------------------------------------------------------------------

constexpr int kThreadTile = 4 * kThreads;  // groups

template <typename T, int kSize>
__device__ inline void load_group(const Group<T>& group, typename T::Bits (&bits)[kSize]) {
  using Bits = typename T::Bits;
  constexpr int kWidth = kSize < kPackWidth<Bits> ? kSize : kPackWidth<Bits>;
  if (group.count == kSize && group.weights_in_a_row() && aligned(group.weight(0), kWidth * sizeof(Bits))) {
#pragma unroll
    for (int first = 0; first < kSize; first += kWidth) {
      const auto pack = load_pack<kWidth>(group.weight(0) + first);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) bits[first + i] = pack.get(i);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) bits[i] = i < group.count ? load_pack<1>(group.weight(i)).get(0) : Bits{0};
}

// Returns how many elements are not finite.
template <typename T, int kSize>
__device__ inline int64_t rank_by_thread(const Group<T>& group) {
  using Key = typename Group<T>::Key;
  typename T::Bits bits[kSize];
  load_group<T, kSize>(group, bits);
  Key keys[kSize];
  int beaten[kSize];
  int64_t nonfinite = 0;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    keys[i] = i < group.count ? group.key(i, bits[i]) : Key{-1};  // behind the last, such a key beats none that stays
    beaten[i] = 0;
    nonfinite += group.is_nonfinite(bits[i]);
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
#pragma unroll
    for (int j = i + 1; j < kSize; ++j) {
      const bool first_wins = keys[i] > keys[j];
      beaten[j] += first_wins;
      beaten[i] += !first_wins;
    }
  }
  Pack<uint8_t, kSize> stays{};
#pragma unroll
  for (int i = 0; i < kSize; ++i) stays.set_in_zeros(i, beaten[i] < group.plan.kept && keys[i] >= 0);
  if (group.count == kSize && group.masks_in_a_row() && aligned(group.mask(0), kSize)) {
    store_pack(group.mask(0), stays);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i < group.count) *group.mask(i) = stays.get(i);
    }
  }
  return nonfinite;
}

// Not inlined, so that each element type gets its own registers.
template <typename T, int kSize>
__device__ __noinline__ void rank_tile_by_threads(const GroupTable& table, const GroupRow& row, int64_t begin,
                                                  int64_t end) {
  int64_t nonfinite = 0;
#pragma unroll 2
  for (int64_t number = begin + threadIdx.x; number < end; number += kThreads) {
    nonfinite += rank_by_thread<T, kSize>(Group<T>(table, row, number));
  }
  if (nonfinite != 0) atomic_add(table.nonfinite + row.tensor, nonfinite);
}

template <int kSize>
__global__ void __launch_bounds__(kThreads) rank_by_threads_kernel(GroupTable table) {
  for_each_tile<kThreadTile>(table, [&](const GroupRow& row, int64_t begin, int64_t end) {
    with_weight_type(table.weights.rows[row.tensor].dtype,
                     [&](auto type) { rank_tile_by_threads<decltype(type), kSize>(table, row, begin, end); });
  });
}

// --- groups of up to 64: half a warp or a warp each, one or two elements a lane
// -----------------------------------------

constexpr int kWarpTile = 64;  // groups

template <typename T, int kWidth>
__device__ __noinline__ void rank_tile_by_warps(const GroupTable& table, const GroupRow& row, int64_t begin,
                                                int64_t end) {
  using Key = typename Group<T>::Key;
  const int lane = threadIdx.x % kWidth;
  int64_t nonfinite = 0;
  // All lanes of a warp go through the same number of groups, for the shuffles.
  for (int64_t first = begin; first < end; first += kThreads / kWidth) {
    const int64_t number = first + threadIdx.x / kWidth;
    const bool mine = number < end;
    const Group<T> group(table, row, mine ? number : begin);
    Key keys[2];
    int beaten[2] = {0, 0};
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int64_t i = lane + part * kWidth;
      keys[part] = -1;
      if (i < group.count) {
        const auto bits = load_pack<1>(group.weight(i)).get(0);
        keys[part] = group.key(i, bits);
        nonfinite += mine && group.is_nonfinite(bits);
      }
    }
    const int count = static_cast<int>(row.size);  // the same in all lanes
    for (int i = 0; i < count; ++i) {
      const Key other = __shfl_sync(kWholeWarp, i < kWidth ? keys[0] : keys[1], i % kWidth, kWidth);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int j = lane + part * kWidth;
        beaten[part] += i != j && (other > keys[part] || (other == keys[part] && i > j));
      }
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int64_t i = lane + part * kWidth;
      if (mine && i < group.count) *group.mask(i) = beaten[part] < row.kept && keys[part] >= 0;
    }
  }
  if (nonfinite != 0) atomic_add(table.nonfinite + row.tensor, nonfinite);
}

__global__ void __launch_bounds__(kThreads) rank_by_warps_kernel(GroupTable table) {
  for_each_tile<kWarpTile>(table, [&](const GroupRow& row, int64_t begin, int64_t end) {
    with_weight_type(table.weights.rows[row.tensor].dtype, [&](auto type) {
      if (row.size <= 32) {
        rank_tile_by_warps<decltype(type), 16>(table, row, begin, end);
      } else {
        rank_tile_by_warps<decltype(type), 32>(table, row, begin, end);
      }
    });
  });
}

// --- longer groups: a block each
// ----------------------------------------------------------------------------------------

constexpr int kRowDigitBits = 11;  // at most: 8 KiB of shared memory

// What stays: keys above `bound`, but of those that are equal to `tied` not the first `going`.
template <typename Key>
struct RowCut {
  Key bound;
  Key tied;
  int64_t going;
};

// What the threads of a block share while they search a digit.
struct RowSearch {
  uint32_t bins[1 << kRowDigitBits];
  uint32_t digit, going, count;  // of the one that the last key to go has: how many of its keys go, and are there
};

// Calls use(i, bits) for the elements of a group, shared by the threads of the block.
template <typename T, typename Use>
__device__ inline void for_each_element(const Group<T>& group, const Use& use) {
  using Bits = typename T::Bits;
  const auto load = [&](auto width, int64_t i) { return load_pack<decltype(width)::value>(group.weight(i)); };
  const auto each = [&](auto width, int64_t first, const auto& pack) {
#pragma unroll
    for (int i = 0; i < decltype(width)::value; ++i) use(first + i, pack.get(i));
  };
  visit<Bits>(make_span(group.weight(0), group.weights_in_a_row(), 0, group.count), load, each);
}

// Finds the digits of the last key to go, from the top down. All threads of the block must call, and get the same.
template <typename T>
__device__ inline RowCut<typename Group<T>::Key> find_cut(const Group<T>& group, RowSearch& search,
                                                          int64_t* nonfinite) {
  using Key = typename Group<T>::Key;
  uint32_t* const bins = search.bins;
  Key prefix = 0;
  int64_t going = 0, ties = 0;
  const int key_bits = group.plan.factors == nullptr ? ScoreKey<T>::kRawBits : ScoreKey<T>::kKeyBits;
  for (int top = key_bits; top > 0;) {
    const int bits = top < kRowDigitBits ? top : kRowDigitBits, shift = top - bits, count = 1 << bits;
    for (int bin = threadIdx.x; bin < count; bin += kThreads) bins[bin] = 0;
    __syncthreads();
    int64_t bad = 0;
    for_each_element(group, [&](int64_t i, typename T::Bits element) {
      const Key key = group.key(i, element);
      // A shift by all bits of the type is none.
      const bool matches = top == key_bits || key >> top == prefix;
      if (key >= 0 && matches) atomicAdd(&bins[key >> shift & (count - 1)], 1u);
      bad += top == key_bits && group.is_nonfinite(element);
    });
    if (bad != 0) atomic_add(nonfinite, bad);
    __syncthreads();
    const int share = (count + kThreads - 1) / kThreads;
    const int first = static_cast<int>(threadIdx.x) * share, last = first + share < count ? first + share : count;
    int64_t sum = 0;
    for (int bin = first; bin < last; ++bin) sum += bins[bin];
    const Scan scan = scan_block(sum);
    if (top == key_bits) {
      going = scan.total - group.plan.kept;  // what the base drops is not in it
      if (going <= 0) return {Key{-1}, Key{-1}, 0};
    }
    int64_t before = scan.before;
    for (int bin = first; bin < last; ++bin) {
      if (before < going && going <= before + bins[bin]) {
        search.digit = static_cast<uint32_t>(bin);
        search.going = static_cast<uint32_t>(going - before);
        search.count = bins[bin];
      }
      before += bins[bin];
    }
    __syncthreads();
    prefix = static_cast<Key>(prefix << bits | static_cast<Key>(search.digit));
    going = search.going;
    ties = search.count;
    top = shift;
    __syncthreads();  // the next digit writes again
  }
  return going == ties ? RowCut<Key>{prefix, prefix, 0} : RowCut<Key>{static_cast<Key>(prefix - 1), prefix, going};
}

template <typename T>
__device__ __noinline__ void mask_row_by_block(const GroupTable& table, const GroupRow& row, int64_t number,
                                               RowSearch& search) {
  using Bits = typename T::Bits;
  using Key = typename Group<T>::Key;
  const Group<T> group(table, row, number);
  const RowCut<Key> cut = find_cut(group, search, table.nonfinite + row.tensor);
  if (cut.going == 0) {
    const auto load = [&](auto width, int64_t i) { return load_pack<decltype(width)::value>(group.weight(i)); };
    const auto use = [&](auto width, int64_t first, const auto& pack) {
      constexpr int kWidth = decltype(width)::value;
      Pack<uint8_t, kWidth> stays{};
#pragma unroll
      for (int i = 0; i < kWidth; ++i) stays.set_in_zeros(i, group.key(first + i, pack.get(i)) > cut.bound);
      store_pack(group.mask(first), stays);
    };
    const bool in_a_row = group.weights_in_a_row() && group.masks_in_a_row();
    visit<Bits>(make_span(group.weight(0), group.mask(0), in_a_row, 0, group.count), load, use);
    return;
  }
  int64_t going = cut.going;
  for (int64_t first = 0; first < group.count; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const Key key = i < group.count ? group.key(i, load_pack<1>(group.weight(i)).get(0)) : Key{-1};
    const bool tie = key == cut.tied;
    const Scan scan = scan_block(tie ? 1 : 0);
    if (i < group.count) *group.mask(i) = key > cut.bound && !(tie && scan.before < going);
    going -= scan.total;  // below zero once enough went
  }
}

__global__ void __launch_bounds__(kThreads) mask_rows_kernel(GroupTable table) {
  __shared__ RowSearch search;
  for_each_tile<1>(table, [&](const GroupRow& row, int64_t begin, int64_t) {
    with_weight_type(table.weights.rows[row.tensor].dtype,
                     [&](auto type) { mask_row_by_block<decltype(type)>(table, row, begin, search); });
  });
}

}  // namespace

// How a group of so many is masked.
enum class GroupKind { kFour, kEight, kWarp, kRow };

inline GroupKind kind_of(int64_t size) {
  return size <= 4                 ? GroupKind::kFour
         : size <= kRankedByThread ? GroupKind::kEight
         : size <= kRankedByWarp   ? GroupKind::kWarp
                                   : GroupKind::kRow;
}

inline int64_t groups_in_tile(GroupKind kind) {
  return kind == GroupKind::kRow ? 1 : kind == GroupKind::kWarp ? kWarpTile : kThreadTile;
}

// All rows of the table are of one kind.
inline void launch_group_masks(GroupKind kind, const GroupTable& table, cudaStream_t stream) {
  if (table.tiles == 0) return;
  const auto kernel = kind == GroupKind::kFour    ? &rank_by_threads_kernel<4>
                      : kind == GroupKind::kEight ? &rank_by_threads_kernel<8>
                      : kind == GroupKind::kWarp  ? &rank_by_warps_kernel
                                                  : &mask_rows_kernel;
  launch(kernel, blocks_for(table.tiles, 8), kThreads, stream, table);
}

}  // namespace pyprune
