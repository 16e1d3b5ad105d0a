#include "group_masks.h"

#include <type_traits>
#include <utility>

#include "group_ranks.h"
#include "row_select.h"
#include "rows.h"
#include "transpose.h"

namespace pyprune::PYPRUNE_CAPABILITY {
namespace {

// Some groups of `size` side by side: lanes are the rows of the first group, of the second, and so on.
struct LaneTile {
  int64_t size, groups, rows;
  Steps steps;
  int64_t group_step;

  LaneTile(const Steps& all, int64_t size, int64_t groups, int64_t rows)
      : size(size), groups(groups), rows(rows), steps(all), group_step(size * all.column) {
    if (rows == 1) {  // then groups are rows as well
      std::swap(this->groups, this->rows);
      steps.row = group_step;
    }
  }
};

// Calls move(element of the tensor, place in the lanes, count) for runs of rows that are next to each other. The
// compiler knows the length of those of 3x3 convolutions.
template <class T, class Move>
void for_each_run(T* tensor, const LaneTile& tile, const Move& move) {
  for (int64_t i = 0; i < tile.size; ++i) {
    for (int64_t g = 0; g < tile.groups; ++g) {
      T* const first = tensor + g * tile.group_step + i * tile.steps.column;
      const int64_t place = i * kLanes + g * tile.rows;
      if (tile.rows == 9) {
        move(first, place, std::integral_constant<int64_t, 9>());
      } else {
        move(first, place, tile.rows);
      }
    }
  }
}

// Copies element i of lane l to out[i * kLanes + l].
template <class T>
void pack(const T* from, const LaneTile& tile, T* out) {
  const auto [row_step, column_step] = tile.steps;
  if (column_step == 1 && row_step != 0) {
    for (int64_t g = 0; g < tile.groups; ++g) {
      transpose(from + g * tile.group_step, row_step, tile.rows, tile.size, out + g * tile.rows, kLanes);
    }
  } else if (row_step == 1) {
    for_each_run(from, tile, [&](const T* first, int64_t place, auto count) {
      __builtin_memcpy(out + place, first, count * sizeof(T));
    });
  } else {
    for_each_run(from, tile, [&, step = row_step](const T* first, int64_t place, auto count) {
      for (int64_t r = 0; r < count; ++r) {
        out[place + r] = first[r * step];
      }
    });
  }
}

// The way back.
void unpack(const uint8_t* from, const LaneTile& tile, uint8_t* to) {
  const auto [row_step, column_step] = tile.steps;
  if (column_step == 1) {
    for (int64_t g = 0; g < tile.groups; ++g) {
      transpose(from + g * tile.rows, kLanes, tile.size, tile.rows, to + g * tile.group_step, row_step);
    }
  } else if (row_step == 1) {
    for_each_run(to, tile,
                 [&](uint8_t* first, int64_t place, auto count) { __builtin_memcpy(first, from + place, count); });
  } else {
    for_each_run(to, tile, [&, step = row_step](uint8_t* first, int64_t place, auto count) {
      for (int64_t r = 0; r < count; ++r) {
        first[r * step] = from[place + r];
      }
    });
  }
}

// Bits: of the weight. Key: of the score. Real: of the factors.
template <class Bits, class Key>
struct Masker {
  using Real = std::conditional_t<sizeof(Bits) == 8, double, float>;
  const GroupTile& tile;
  GroupRoom& room;
  int64_t nonfinite = 0;

  const Bits* const weight = static_cast<const Bits*>(tile.weight);
  const Real* const factors = static_cast<const Real*>(tile.factors);
  const bool raw = tile.factors == nullptr && tile.base == nullptr;
  Key* const keys = reinterpret_cast<Key*>(room.keys);
  const Dtype scores = tile.factors == nullptr ? tile.dtype : sizeof(Key) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;

  void run() {
    if (tile.size > kRankedSize) {
      return mask_rows();
    }
    const int64_t whole = tile.columns / tile.size * tile.size;
    const bool in_rows = tile.weight_steps.column == 1 && tile.mask_steps.column == 1 &&
                         (tile.base == nullptr || tile.base_steps.column == 1);
    if (!in_rows || !(rank_in_registers<4>(whole) || rank_in_registers<8>(whole))) {
      rank_in_lanes(0, tile.size, whole / tile.size);
    }
    if (whole < tile.columns) {
      rank_in_lanes(whole, tile.columns - whole, 1);
    }
  }

 private:
  // Returns the largest magnitude. A call for thousands of keys costs nothing; inlined wherever keys are made, these
  // loops took most of the compilation.
  [[gnu::noinline]] Bits make_keys(const Bits* x, const Real* factor, const uint8_t* base, int64_t count,
                                   Key* __restrict to) {
    const auto write = [&](const auto& key) {
      Bits largest = 0;
      for (int64_t i = 0; i < count; ++i) {
        const Bits magnitude = x[i] & kMagnitude<Bits>;
        largest = magnitude > largest ? magnitude : largest;
        to[i] = key(i);
      }
      return largest;
    };
    const auto write_all = [&](const auto& key) {
      // A key of -1, without a branch.
      return base == nullptr ? write(key) : write([&](int64_t i) { return key(i) | -Key{base[i] == 0}; });
    };
    if (factor == nullptr) {
      return write_all([&](int64_t i) { return static_cast<Key>(x[i] & kMagnitude<Bits>); });
    }
    if constexpr (sizeof(Key) == 2) {
      return 0;  // products have more bits
    } else {
      const Real* values = reinterpret_cast<const Real*>(x);
      if constexpr (sizeof(Key) == 4) {
        values = widened(tile.dtype, x, count, room.widened);
      }
      return write_all([&](int64_t i) {
        return static_cast<Key>(std::bit_cast<Key>(values[i] * factor[i]) & kMagnitude<std::make_unsigned_t<Key>>);
      });
    }
  }

  // Counts what is not finite, knowing the largest magnitude. Returns that.
  void count_nonfinite(const Bits* x, int64_t count, Bits largest) {
    if (largest < infinity_bits(tile.dtype)) {
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      nonfinite += (x[i] & kMagnitude<Bits>) >= infinity_bits(tile.dtype);
    }
  }

  static Bits largest_of(const Bits* x, int64_t count) {
    Bits largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Bits magnitude = x[i] & kMagnitude<Bits>;
      largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
  }

  // --- groups of up to kRankedSize
  // ----------------------------------------------------------------------------------

  // If there is a way for groups of this size, ranks those in the first columns.
  template <int kSize>
  bool rank_in_registers(int64_t columns) {
    if constexpr (kRanksInRegisters<Key, kSize>) {
      if (tile.size == kSize) {
        rank_rows<kSize>(columns);
        return true;
      }
    }
    return false;
  }

  template <int kSize>
  void rank_rows(int64_t columns) {
    for (int64_t row = 0; row < tile.rows; ++row) {
      const Bits* const x = weight + row * tile.weight_steps.row;
      uint8_t* const mask = tile.mask + row * tile.mask_steps.row;
      if (raw) {
        Key largest = 0;
        rank_run<Key, kSize>(reinterpret_cast<const Key*>(x), kMagnitude<Bits>, columns, tile.kept, mask, largest);
        count_nonfinite(x, columns, largest);
        continue;
      }
      for (int64_t start = 0; start < columns; start += kGroupPiece) {
        const int64_t count = columns - start < kGroupPiece ? columns - start : kGroupPiece;
        const uint8_t* const base = tile.base == nullptr ? nullptr : tile.base + row * tile.base_steps.row + start;
        const Real* const factor = factors == nullptr ? nullptr : factors + start;
        count_nonfinite(x + start, count, make_keys(x + start, factor, base, count, keys));
        Key largest = 0;
        rank_run<Key, kSize>(keys, Key{-1}, count, tile.kept, mask + start, largest);
      }
    }
  }

  // `groups` groups of `size` from a column on: as many side by side as there are lanes.
  void rank_in_lanes(int64_t column, int64_t size, int64_t groups) {
    const int64_t rows_together = tile.rows < kLanes ? tile.rows : kLanes;
    const int64_t groups_together = kLanes / rows_together;
    for (int64_t group = 0; group < groups; group += groups_together) {
      const int64_t some = groups - group < groups_together ? groups - group : groups_together;
      for (int64_t row = 0; row < tile.rows; row += rows_together) {
        const int64_t rows = tile.rows - row < rows_together ? tile.rows - row : rows_together;
        rank_lanes_at(row, rows, column + group * size, size, some);
      }
    }
  }

  void rank_lanes_at(int64_t row, int64_t rows, int64_t column, int64_t size, int64_t groups) {
    const auto at = [&](const Steps& steps) { return row * steps.row + column * steps.column; };
    const auto lanes_of = [&](const Steps& steps) { return LaneTile(steps, size, groups, rows); };
    const int64_t lanes = groups * rows, count = size * kLanes;
    Bits* const x = reinterpret_cast<Bits*>(room.weights);
    if (lanes < kLanes) {
      __builtin_memset(x, 0, count * sizeof(Bits));
    }
    pack(weight + at(tile.weight_steps), lanes_of(tile.weight_steps), x);
    Real* factor = nullptr;
    if (factors != nullptr) {
      factor = reinterpret_cast<Real*>(room.factors);
      pack(factors + column, lanes_of({0, 1}), factor);
    }
    uint8_t* base = nullptr;
    if (tile.base != nullptr) {
      base = room.base;
      pack(tile.base + at(tile.base_steps), lanes_of(tile.base_steps), base);
    }
    count_nonfinite(x, count, make_keys(x, factor, base, count, keys));
    if (size == 4) {
      rank_lanes<Key, 4>(keys, size, lanes, tile.kept, room.mask);
    } else if (size == 8) {
      rank_lanes<Key, 8>(keys, size, lanes, tile.kept, room.mask);
    } else if (size == 16) {
      rank_lanes<Key, 16>(keys, size, lanes, tile.kept, room.mask);
    } else {
      rank_lanes<Key, 0>(keys, size, lanes, tile.kept, room.mask);
    }
    unpack(room.mask, lanes_of(tile.mask_steps), tile.mask + at(tile.mask_steps));
  }

  // --- longer groups
  // ------------------------------------------------------------------------------------------------

  void mask_rows() {
    Key guess = -1;
    for (int64_t row = 0; row < tile.rows; ++row) {
      for (int64_t column = 0; column < tile.columns; column += tile.size) {
        guess = mask_row(row, column, guess);
      }
    }
  }

  // Returns the bound that it found.
  [[gnu::noinline]] Key mask_row(int64_t row, int64_t column, Key guess) {
    const int64_t count = tile.columns - column < tile.size ? tile.columns - column : tile.size;
    const Bits* const x = weight + row * tile.weight_steps.row + column;
    const uint8_t* const base = tile.base == nullptr ? nullptr : tile.base + row * tile.base_steps.row + column;
    const Real* const factor = factors == nullptr ? nullptr : factors + column;
    uint8_t* const mask = tile.mask + row * tile.mask_steps.row + column;
    const Bits largest_magnitude = largest_of(x, count);
    count_nonfinite(x, count, largest_magnitude);

    const auto piece_of = [&](int64_t start) { return count - start < kGroupPiece ? count - start : kGroupPiece; };
    const auto make_piece = [&](int64_t start, Key* to) {
      make_keys(x + start, factor == nullptr ? nullptr : factor + start, base == nullptr ? nullptr : base + start,
                piece_of(start), to);
    };
    Key* const row_keys = reinterpret_cast<Key*>(room.row_keys);
    const bool in_cache = raw || count <= kRowInCache;
    Key largest = static_cast<Key>(largest_magnitude);
    if (!raw) {
      largest = -1;
      for (int64_t start = 0; start < count; start += kGroupPiece) {
        Key* const to = in_cache ? row_keys + start : keys;
        make_piece(start, to);
        for (int64_t i = 0; i < piece_of(start); ++i) {
          largest = to[i] > largest ? to[i] : largest;
        }
      }
    }
    // Calls visit(start, run) for the keys in order; those of very long rows are made anew each time.
    const auto for_each_run = [&](const auto& visit) {
      if (in_cache) {
        const Key* const all = raw ? reinterpret_cast<const Key*>(x) : row_keys;
        return visit(int64_t{0}, KeyRun<Key>{all, raw ? static_cast<Key>(kMagnitude<Bits>) : Key{-1}, count});
      }
      for (int64_t start = 0; start < count; start += kGroupPiece) {
        make_piece(start, keys);
        visit(start, KeyRun<Key>{keys, Key{-1}, piece_of(start)});
      }
    };
    const auto count_all_above = [&](Key bound) {
      int64_t above = 0;
      for_each_run([&](int64_t, const KeyRun<Key>& run) { above += count_above(run, bound); });
      return above;
    };
    const int64_t present = base == nullptr ? count : count_all_above(-1);
    const int64_t kept = tile.kept < count ? tile.kept : count;
    const Cut<Key> cut = find_cut<Key>(scores, present, kept, largest, guess, count_all_above);
    int64_t going = cut.going;
    for_each_run(
        [&](int64_t start, const KeyRun<Key>& run) { going = write_cut(run, cut.bound, going, mask + start); });
    return cut.bound;
  }

  // Writes the mask of a run, of whose keys equal to bound + 1 the first `going` go. Returns how many are still to
  // go.
  static int64_t write_cut(const KeyRun<Key>& run, Key bound, int64_t going, uint8_t* mask) {
    int64_t done = 0;
    while (going > 0 && done < run.count) {
      const int64_t count = run.count - done < kLanes ? run.count - done : kLanes;
      const KeyRun<Key> part{run.bits + done, run.magnitude, count};
      const int64_t ties = count_above(part, bound) - count_above(part, static_cast<Key>(bound + 1));
      if (ties <= going) {
        write_above(part, static_cast<Key>(bound + 1), mask + done);
        going -= ties;
      } else {
        for (int64_t i = 0; i < count; ++i) {
          const Key key = part.bits[i] & part.magnitude;
          const bool goes = key == bound + 1 && going > 0;
          going -= goes;
          mask[done + i] = key > bound && !goes;
        }
      }
      done += count;
    }
    write_above(KeyRun<Key>{run.bits + done, run.magnitude, run.count - done}, bound, mask + done);
    return going;
  }
};

template <class Bits, class Key>
int64_t mask_as(const GroupTile& tile, GroupRoom& room) {
  Masker<Bits, Key> masker{tile, room};
  masker.run();
  return masker.nonfinite;
}

}  // namespace

int64_t mask_groups(const GroupTile& tile, GroupRoom& room) {
  switch (item_size(tile.dtype)) {
    case 8: return mask_as<uint64_t, int64_t>(tile, room);
    case 4: return mask_as<uint32_t, int32_t>(tile, room);
    default:
      return tile.factors == nullptr ? mask_as<uint16_t, int16_t>(tile, room)
                                     : mask_as<uint16_t, int32_t>(tile, room);
  }
}

}  // namespace pyprune::PYPRUNE_CAPABILITY
