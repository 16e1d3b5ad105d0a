// A list of weights is read once, in the order of memory, whatever the block: one dimension after the other is
// summed, the first one first. Only elements of one dimension are added in a row, so the order is one of memory in
// both layouts of a convolution. Rows with 64 elements or more behind each are added as rows, others by 16 lanes, so
// that there is always something for vector registers to do side by side. Rows of a few KiB look like no stream to
// the processor when four are read at a time: what comes next is fetched by hand, which halves the time of input
// channels.
#include "unit_sums.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "capability.h"
#include "kernels/unit_scores.h"

namespace pyprune {
namespace {

constexpr int64_t kBatch = 8192;  // elements that are summed at a time, so that their sums stay in the cache

double* with_room(std::vector<double>& room, int64_t count) {
  room.resize(std::max(room.size(), static_cast<size_t>(count)));
  return room.data();
}

// [before][size][inside] to [before][units][inside], where later dimensions have `behind` elements.
void sum_along(const void* data, Dtype dtype, const UnitTerm& term, int64_t before, const UnitDim& dim,
               int64_t behind, int64_t inside, double* out) {
  const auto kernel = PYPRUNE_KERNEL(sum_units);
  const char* x = static_cast<const char*>(data);
  const int64_t row = inside * item_size(dtype);
  const int64_t lanes = unit_lanes(dim.block, behind), pieces = unit_pieces(dim.block, behind);
  if (pieces > 1) {
    const int64_t rows = kUnitSteps * lanes;
    std::vector<double> sums(pieces * inside);
    for (int64_t i = 0; i < before; ++i) {
      for (int64_t first = 0; first < dim.size; first += dim.block, out += inside) {
        const int64_t size = std::min(dim.block, dim.size - first);
        for (int64_t r = 0; r < size; r += rows) {
          kernel(x + (first + r) * row, dtype, term, std::min(rows, size - r), inside, lanes, 1,
                 sums.data() + r / rows * inside);
        }
        sum_along(sums.data(), Dtype::kFloat64, term.of_sums(), 1, {(size + rows - 1) / rows, pieces, 0}, behind,
                  inside, out);
      }
      x += dim.size * row;
    }
    return;
  }
  const int64_t full = dim.size / dim.block, left = dim.size % dim.block;
  if (left == 0) {
    return kernel(x, dtype, term, dim.block, inside, lanes, before * full, out);
  }
  for (int64_t i = 0; i < before; ++i, x += dim.size * row, out += (full + 1) * inside) {
    kernel(x, dtype, term, dim.block, inside, lanes, full, out);
    kernel(x + (dim.size - left) * row, dtype, term, left, inside, lanes, 1, out + full * inside);
  }
}

}  // namespace

UnitSums::UnitSums(const Strided& tensor, const UnitDims& dims, const UnitTerm& term, bool mean, bool wide, void* out)
    : tensor_(tensor), term_(term), mean_(mean), wide_(wide), out_(static_cast<char*>(out)) {
  const size_t first = dims.first_summed();
  rows_ = dims.dims[first];
  later_.assign(dims.dims.begin() + first + 1, dims.dims.end());
  behind_ = dims.elements_behind(first);
  outer_ = behind_ == 0 ? 0 : tensor.numel / (rows_.size * behind_);
  for (const UnitDim& dim : later_) {
    scores_of_tile_ *= dim.units();
  }
  see_as_it_lies(dims, first);

  const int64_t lanes = unit_lanes(rows_.block, behind_);
  pieces_of_tile_ = unit_pieces(rows_.block, behind_);
  rows_of_piece_ = pieces_of_tile_ > 1 ? kUnitSteps * lanes : rows_.block;
  if (inside_ < behind_) {
    tiles_ = outer_ * rows_.units();
    parts_ = outer_;
    elements_of_part_ = rows_.size * behind_;
    return;
  }
  if (rows_.size % rows_.block == 0) {
    rows_.size *= outer_;
    outer_ = 1;
  }
  tiles_ = outer_ * rows_.units();
  parts_ = tiles_ * pieces_of_tile_;
  elements_of_part_ = std::min(rows_.block, rows_of_piece_) * behind_;
  if (pieces_of_tile_ > 1) {
    pieces_.resize(parts_ * behind_);
  }
}

// Dimensions from rows_ on may be nested in any order, if together they are dense; else they are copied into C order.
void UnitSums::see_as_it_lies(const UnitDims& dims, size_t first) {
  in_memory_.resize(later_.size() + 1);
  std::iota(in_memory_.begin(), in_memory_.end(), 0);
  inside_ = behind_;
  if (!dims.as_they_lie || tensor_.numel == 0) {
    return;
  }
  std::vector<size_t> order = in_memory_;
  const auto dim = [&](size_t i) -> const UnitDim& { return dims.dims[first + i]; };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return dim(a).stride > dim(b).stride; });
  int64_t dense = 1, inside = 1;
  for (size_t i = order.size(); i-- > 0; dense *= dim(order[i]).size) {
    if (dim(order[i]).stride != dense) {
      return;
    }
    inside = order[i] == 0 ? dense : inside;
  }
  for (size_t d = first; d-- > 0; dense *= dims.dims[d].size) {
    if (dims.dims[d].stride != dense) {
      return;
    }
  }
  tensor_.sizes.assign(1, tensor_.numel);
  tensor_.strides.assign(1, 1);
  in_memory_ = order;
  inside_ = inside;
}

int64_t UnitSums::rows_of(int64_t tile) const {
  return std::min(rows_.block, rows_.size - tile % rows_.units() * rows_.block);
}

void UnitSums::add(int64_t first, int64_t count, Rooms& rooms) {
  if (inside_ < behind_) {
    const int64_t together = std::max<int64_t>(1, kBatch / elements_of_part_);
    for (const int64_t end = first + count; first < end; first += together) {
      const int64_t now = std::min(together, end - first);
      const char* x = tensor_.data + first * elements_of_part_ * item_size(tensor_.dtype);
      double* sums = with_room(rooms.sums, now * rows_.units() * behind_);
      sum_along(x, tensor_.dtype, term_, now * (behind_ / inside_), rows_, behind_, inside_, sums);
      write(first * rows_.units(), now, rows_.units(), rooms);
    }
    return;
  }
  const auto kernel = PYPRUNE_KERNEL(sum_units);
  const int64_t lanes = unit_lanes(rows_.block, behind_), units = rows_.units();
  const auto start_of = [&](int64_t part) {
    const int64_t tile = part / pieces_of_tile_;
    const int64_t row = tile / units * rows_.size + tile % units * rows_.block +
                        std::min(part % pieces_of_tile_ * rows_of_piece_, rows_of(tile));
    return row * behind_;
  };
  const int64_t end = first + count, start = start_of(first);
  const int64_t stop = end == parts_ ? tensor_.numel : start_of(end);
  const char* x = tensor_.in_a_row(start, stop - start, rooms.copied);
  const int64_t together = std::max<int64_t>(1, kBatch / elements_of_part_);
  for (int64_t part = first; part < end;) {
    const int64_t tile = part / pieces_of_tile_, whole = rows_of(tile);
    const int64_t rows = std::min(rows_of_piece_, whole - part % pieces_of_tile_ * rows_of_piece_);
    int64_t now = 1;
    if (pieces_of_tile_ > 1) {
      if (rows > 0) {
        kernel(x, tensor_.dtype, term_, rows, behind_, lanes, 1, pieces_.data() + part * behind_);
      }
    } else {
      const int64_t full = whole < rows_.block ? 1 : rows_.size / rows_.block - tile % units;
      now = std::min({full, together, end - part});
      kernel(x, tensor_.dtype, term_, rows, behind_, lanes, now, with_room(rooms.sums, now * behind_));
      write(tile, now, 1, rooms);
    }
    x += now * std::max<int64_t>(0, rows) * behind_ * item_size(tensor_.dtype);
    part += now;
  }
}

void UnitSums::finish(int64_t tile, Rooms& rooms) const {
  const int64_t pieces = (rows_of(tile) + rows_of_piece_ - 1) / rows_of_piece_;
  sum_along(pieces_.data() + tile * pieces_of_tile_ * behind_, Dtype::kFloat64, term_.of_sums(), 1,
            {pieces, pieces_of_tile_, 0}, behind_, behind_, with_room(rooms.sums, behind_));
  write(tile, 1, 1, rooms);
}

// What is left for tiles whose rows have been summed, which lie in rooms.sums: [count], and in it as in memory, with
// `units` along rows_.
void UnitSums::write(int64_t tile, int64_t count, int64_t units, Rooms& rooms) const {
  if (!std::is_sorted(in_memory_.begin(), in_memory_.end())) {
    std::vector<int64_t> sizes{count, units}, strides(in_memory_.size() + 1);
    for (const UnitDim& dim : later_) {
      sizes.push_back(dim.size);
    }
    int64_t stride = 1;
    for (size_t i = in_memory_.size(); i-- > 0; stride *= sizes[in_memory_[i] + 1]) {
      strides[in_memory_[i] + 1] = stride;
    }
    strides[0] = stride;
    const Strided turned(rooms.sums.data(), Dtype::kFloat64, sizes.data(), strides.data(), sizes.size());
    turned.gather(0, turned.numel, with_room(rooms.next, turned.numel));
    std::swap(rooms.sums, rooms.next);
  }
  int64_t before = count * units, behind = behind_;
  for (const UnitDim& dim : later_) {
    behind /= dim.size;
    if (dim.block > 1) {
      sum_along(rooms.sums.data(), Dtype::kFloat64, term_.of_sums(), before, dim, behind, behind,
                with_room(rooms.next, before * dim.units() * behind));
      std::swap(rooms.sums, rooms.next);
    }
    before *= dim.units();
  }
  if (term_.maximum && term_.power != UnitPower::kSigned && term_.power != UnitPower::kMagnitude) {
    for (int64_t i = 0; i < before; ++i) {
      double& score = rooms.sums[i];
      score = term_.power == UnitPower::kSquare ? score * score : std::pow(score, term_.p);
    }
  }
  if (mean_) {
    divide_by_counts(tile, rooms.sums, before);
  }
  PYPRUNE_KERNEL(write_scores)
  (rooms.sums.data(), before, wide_, out_ + tile * scores_of_tile_ * (wide_ ? sizeof(double) : sizeof(float)));
}

// By the number of elements that each unit really has.
void UnitSums::divide_by_counts(int64_t tile, std::vector<double>& scores, int64_t count) const {
  for (int64_t i = 0; i < count; ++i) {
    int64_t elements = rows_of(tile + i / scores_of_tile_), unit = i % scores_of_tile_;
    for (size_t d = later_.size(); d-- > 0;) {
      const UnitDim& dim = later_[d];
      elements *= std::min(dim.block, dim.size - unit % dim.units() * dim.block);
      unit /= dim.units();
    }
    scores[i] /= static_cast<double>(elements);
  }
}

}  // namespace pyprune
