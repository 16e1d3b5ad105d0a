#include "sweeper.h"

#include <algorithm>

#include "../norm_order.h"
#include "capability.h"
#include "parallel.h"

namespace pyprune {
namespace {

constexpr int64_t kProbe = kNormBlock;
static_assert(kProbe % kNormBlock == 0, "sums of squares are made of whole blocks");

Sweep sweep_run(const uint16_t* x, const uint8_t* base, uint8_t* mask, int64_t n, const Bounds& bounds,
                uint16_t* bits, uint16_t* at, const Errands& errands) {
  return PYPRUNE_KERNEL(sweep16)(x, base, mask, n, bounds, bits, at, errands);
}
Sweep sweep_run(const uint32_t* x, const uint8_t* base, uint8_t* mask, int64_t n, const Bounds& bounds,
                uint32_t* bits, uint16_t* at, const Errands& errands) {
  return PYPRUNE_KERNEL(sweep32)(x, base, mask, n, bounds, bits, at, errands);
}
Sweep sweep_run(const uint64_t* x, const uint8_t* base, uint8_t* mask, int64_t n, const Bounds& bounds,
                uint64_t* bits, uint16_t* at, const Errands& errands) {
  return PYPRUNE_KERNEL(sweep64)(x, base, mask, n, bounds, bits, at, errands);
}

}  // namespace

Sweeper::Sweeper(const std::vector<Strided>& weights, const std::vector<Strided>& masks,
                 const std::vector<std::optional<Strided>>& bases)
    : weights_(weights), masks_(masks), bases_(bases) {
  for (const Chunk& chunk : chunks_of(weights)) {
    const int64_t probe = chunk.count <= 2 * kProbe ? chunk.count : kProbe;
    probes_.push_back(pieces_.size());
    probe_elements_ += probe;
    pieces_.push_back({{chunk.tensor, chunk.start, probe}, true, chunk.count});
    if (probe < chunk.count) {
      rest_.push_back(pieces_.size());
      pieces_.push_back({{chunk.tensor, chunk.start + probe, chunk.count - probe}, false, chunk.count});
    }
  }
  swept_.resize(pieces_.size());
  workers_.resize(pieces_.size() > 1 ? thread_count() : 1);
}

std::vector<int64_t> Sweeper::nonfinite() const {
  std::vector<int64_t> counts(weights_.size());
  for (size_t i = 0; i < pieces_.size(); ++i) {
    counts[pieces_[i].tensor] += swept_[i].nonfinite;
  }
  return counts;
}

void Sweeper::share_pieces(Which which, const std::function<void(size_t, Worker&)>& body) {
  const std::vector<size_t>* some = which == Which::kProbes ? &probes_ : which == Which::kRest ? &rest_ : nullptr;
  const int64_t elements = which == Which::kProbes ? probe_elements_ : elements_of(weights_);
  share_tasks(static_cast<int64_t>(some ? some->size() : pieces_.size()), elements,
              [&](int64_t task, int64_t worker) { body(some ? (*some)[task] : task, workers_[worker]); });
}

void Sweeper::sweep(Which which, const std::function<Bounds(size_t)>& bounds_of, bool store, NormBlocks* squares) {
  share_pieces(which, [&](size_t index, Worker& worker) {
    const Piece& piece = pieces_[index];
    Swept& swept = swept_[index];
    with_runs(piece, worker, [&]<class T>(const T* x, const uint8_t* base, uint8_t* mask) {
      T* bits = nullptr;
      uint16_t* positions = nullptr;
      if (store) {
        bits = reinterpret_cast<T*>(worker.bits.reserve((piece.count + 1) * sizeof(T)));
        positions = reinterpret_cast<uint16_t*>(worker.positions.reserve((piece.count + 1) * sizeof(uint16_t)));
      }
      const Bounds bounds = bounds_of(index);
      const Errands errands{squares != nullptr ? squares->room(piece) : nullptr, weights_[piece.tensor].dtype,
                            piece.probe ? next_probe(index) : nullptr};
      const Sweep found = sweep_run(x, base, mask, piece.count, bounds, bits, positions, errands);
      if (store) {
        worker.bits.keep(found.candidates * sizeof(T));
        worker.positions.keep(found.candidates * sizeof(uint16_t));
      }
      swept = {bounds, found.above, found.candidates, 0, bits, positions};
      const uint64_t infinity = infinity_bits(weights_[piece.tensor].dtype);
      if (found.largest >= infinity) {
        swept.nonfinite = std::count_if(x, x + piece.count, [=](T one) { return (one & kMagnitude<T>) >= infinity; });
      }
    });
  });
}

void Sweeper::sum_squares(Which which, NormBlocks& squares) {
  share_pieces(which, [&](size_t index, Worker& worker) {
    const Piece& piece = pieces_[index];
    squares.add(piece, weights_[piece.tensor].in_a_row(piece.start, piece.count, worker.weight_room));
  });
}

// Where the probe lies that this thread will probably sweep next. Between probes nothing foresees where memory is
// read.
const void* Sweeper::next_probe(size_t index) const {
  const size_t next = index + 2;  // behind the rest of the same chunk
  if (next >= pieces_.size() || !pieces_[next].probe || !weights_[pieces_[next].tensor].contiguous()) {
    return nullptr;
  }
  return weights_[pieces_[next].tensor].at(pieces_[next].start);
}

void Sweeper::clear() {
  for (Worker& worker : workers_) {
    worker.bits.clear();
    worker.positions.clear();
  }
}

void Sweeper::rewrite(size_t index, int64_t going) {
  const Bounds bounds = swept_[index].bounds;
  const bool all = going == swept_[index].candidates;
  const int64_t middle = all ? bounds.high : bounds.low;
  Worker worker;
  with_runs(pieces_[index], worker, [&]<class T>(const T* x, const uint8_t* base, uint8_t* mask) {
    const int64_t count = pieces_[index].count;
    sweep_run(x, base, mask, count, {middle, middle, middle}, nullptr, nullptr, {});
    for (int64_t i = 0; i < count && !all && going > 0; ++i) {
      const int64_t magnitude = static_cast<int64_t>(x[i] & kMagnitude<T>);
      if (bounds.low < magnitude && magnitude <= bounds.high && (base == nullptr || base[i] != 0)) {
        mask[i] = 0;
        --going;
      }
    }
  });
}

int64_t Sweeper::count_between(size_t index, int64_t low, int64_t high) const {
  const Swept& swept = swept_[index];
  int64_t count = 0;
  by_bits(weights_[pieces_[index].tensor].dtype, [&]<class T>(T) {
    const T* bits = static_cast<const T*>(swept.bits);
    const T first = static_cast<T>(low + 1), size = static_cast<T>(high - low);
    count = std::count_if(bits, bits + swept.candidates, [=](T one) { return static_cast<T>(one - first) < size; });
  });
  return count;
}

void Sweeper::correct(size_t index, int64_t low, int64_t high, int64_t going) {
  const Swept& swept = swept_[index];
  const Strided& mask = masks_[pieces_[index].tensor];
  const bool flat = mask.contiguous();
  // Right are those on the same side of the middle and of the ties. The others come at random: they are gathered
  // without a branch, and as their masks are no longer in cache, all of these are fetched before the first is
  // written.
  const int64_t middle = swept.bounds.middle, from = std::min(low, middle) + 1, to = std::max(high, middle) + 1;
  constexpr int64_t kTogether = 256;
  uint8_t* masks[kTogether];
  int64_t doubtful[kTogether];
  by_bits(weights_[pieces_[index].tensor].dtype, [&]<class T>(T) {
    const T* bits = static_cast<const T*>(swept.bits);
    const T first = static_cast<T>(from), size = static_cast<T>(to - from);
    for (int64_t i = 0; i < swept.candidates;) {
      int64_t count = 0;
      for (const int64_t end = std::min(swept.candidates, i + kTogether); i < end; ++i) {
        doubtful[count] = i;
        count += static_cast<T>(bits[i] - first) < size;
      }
      for (int64_t j = 0; j < count; ++j) {
        const int64_t at = pieces_[index].start + swept.positions[doubtful[j]];
        masks[j] = reinterpret_cast<uint8_t*>(mask.data) + (flat ? at : mask.offset(at));
        __builtin_prefetch(masks[j], 1);
      }
      for (int64_t j = 0; j < count; ++j) {
        const int64_t one = static_cast<int64_t>(bits[doubtful[j]]);
        const bool tie = low < one && one <= high;
        *masks[j] = one > high || (tie && going <= 0);
        going -= tie;
      }
    }
  });
}

// Calls visit with the weight bits and the base of a piece in a row, and with room for its mask in a row, which is
// put into place.
template <class Visit>
void Sweeper::with_runs(const Piece& piece, Worker& worker, const Visit& visit) {
  const Strided &weight = weights_[piece.tensor], &mask = masks_[piece.tensor];
  const char* row = weight.in_a_row(piece.start, piece.count, worker.weight_room);
  char* mask_row = mask.to_write(piece.start, piece.count, worker.mask_room);
  const char* base_row = nullptr;
  if (!bases_.empty() && bases_[piece.tensor].has_value()) {
    base_row = bases_[piece.tensor]->in_a_row(piece.start, piece.count, worker.base_room);
  }
  by_bits(weight.dtype, [&]<class T>(T) {
    visit(reinterpret_cast<const T*>(row), reinterpret_cast<const uint8_t*>(base_row),
          reinterpret_cast<uint8_t*>(mask_row));
  });
  if (!mask.contiguous()) {
    mask.scatter(piece.start, piece.count, mask_row);
  }
}

}  // namespace pyprune
