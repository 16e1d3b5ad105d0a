// The sweep over a list of weights: provisional masks, counts, and the few candidates between two bounds.
//
// A chunk is swept in two pieces. Its first elements are a probe: once the probes of all chunks are swept, they tell
// so much that the rest can be swept between far tighter bounds.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "arena.h"
#include "kernels/threshold.h"
#include "norm_blocks.h"
#include "score.h"
#include "strided.h"

namespace pyprune {

// A run of one weight, at most a chunk. A probe stands for all of its chunk; small chunks are all probe.
struct Piece : Chunk {
  bool probe;
  int64_t of;  // elements in its chunk

  double stands_for() const { return static_cast<double>(of) / static_cast<double>(count); }
};

// What is known of a piece.
struct Swept {
  Bounds bounds{};
  int64_t above = 0;       // elements above bounds.low, none of which its base lacks
  int64_t candidates = 0;  // of these, not above bounds.high
  int64_t nonfinite = 0;
  const void* bits = nullptr;  // magnitudes of the candidates, in order; null if they were only counted
  const uint16_t* positions = nullptr;
};

enum class Which { kAll, kProbes, kRest };

class Sweeper {
 public:
  // `bases` is empty, or has one for some weights: what it lacks lies below all bounds.
  Sweeper(const std::vector<Strided>& weights, const std::vector<Strided>& masks,
          const std::vector<std::optional<Strided>>& bases);

  // In the order of the list.
  const std::vector<Piece>& pieces() const { return pieces_; }
  const std::vector<Swept>& swept() const { return swept_; }
  std::vector<int64_t> nonfinite() const;  // elements of each weight that are not finite

  // Sweeps pieces, each between bounds_of(piece). Candidates are set aside, or with !store only counted. If there is
  // something to put them, sums the squares of what it reads, too.
  void sweep(Which which, const std::function<Bounds(size_t piece)>& bounds_of, bool store, NormBlocks* squares);
  // Only sums squares.
  void sum_squares(Which which, NormBlocks& squares);
  // Forgets the candidates.
  void clear();

  // Writes the mask of a piece whose candidates were only counted anew: the first `going` of them go.
  void rewrite(size_t piece, int64_t going);
  // For a piece whose candidates were set aside: how many have bits above `low`, up to `high`; and to correct the
  // masks: what is above `high` is kept, and of those in between all but the first `going`.
  int64_t count_between(size_t piece, int64_t low, int64_t high) const;
  void correct(size_t piece, int64_t low, int64_t high, int64_t going);

 private:
  // What a thread needs to itself.
  struct Worker {
    Arena bits, positions;
    Room weight_room, mask_room, base_room;  // for tensors that are not contiguous
  };

  void share_pieces(Which which, const std::function<void(size_t piece, Worker& worker)>& body);
  const void* next_probe(size_t index) const;
  template <class Visit>
  void with_runs(const Piece& piece, Worker& worker, const Visit& visit);

  const std::vector<Strided>& weights_;
  const std::vector<Strided>& masks_;
  const std::vector<std::optional<Strided>>& bases_;
  std::vector<Piece> pieces_;
  std::vector<size_t> probes_, rest_;
  int64_t probe_elements_ = 0;
  std::vector<Swept> swept_;
  std::vector<Worker> workers_;
};

}  // namespace pyprune
