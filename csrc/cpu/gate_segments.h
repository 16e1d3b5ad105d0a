// How a weight with shared gates is cut for the threads, and in which order its sums are taken.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../gate_blocks.h"
#include "denormals.h"
#include "kernels/gate.h"
#include "parallel.h"
#include "strided.h"

namespace pyprune {

// Segments of one piece are summed one after the other; the sums of pieces are added in order. So the order depends
// on the shapes alone, and a gate with many weights still keeps all threads busy.
constexpr int64_t kSegmentsPerPiece = 64;
constexpr int64_t kElementsPerTask = kChunk;

// A contiguous run of weights, at most kGateBlock of them, with whole gates or a part of one.
struct Segment {
  int64_t start;  // in the weight
  int64_t gate;   // the first one
  int64_t gates;
  int64_t run;  // weights of each in this segment
  int64_t sum;  // where the sum of the first gate belongs; the next gate's is `pieces` further
};

// Cuts a weight with shared gates into segments, in an order that the shapes alone decide.
struct Segments {
  const GateBlocks& blocks;
  int64_t gates_per_range, ranges, parts, steps, pieces;

  explicit Segments(const GateBlocks& blocks_) : blocks(blocks_) {
    gates_per_range = std::clamp<int64_t>(kGateBlock / blocks.run, 1, blocks.gates_in_row);
    ranges = (blocks.gates_in_row + gates_per_range - 1) / gates_per_range;
    parts = (blocks.run + kGateBlock - 1) / kGateBlock;
    steps = blocks.repeats() * parts;
    pieces = (steps + kSegmentsPerPiece - 1) / kSegmentsPerPiece;
  }

  // Calls visit(segment) for all, those of one piece in order and by one thread.
  template <class Visit>
  void for_each(const Visit& visit) const {
    const int64_t count = blocks.rows() * ranges * pieces;
    const int64_t elements = std::max<int64_t>(1, gates_per_range * blocks.run * blocks.repeats() / pieces);
    const int64_t per_task = std::max<int64_t>(1, kElementsPerTask / elements);
    share_tasks((count + per_task - 1) / per_task, count * elements, [&](int64_t task, int64_t) {
      const KeepDenormals exact;
      for (int64_t i = task * per_task; i < std::min(count, (task + 1) * per_task); ++i) {
        const int64_t piece = i % pieces, range = i / pieces % ranges, row = i / pieces / ranges;
        for (int64_t step = piece * kSegmentsPerPiece; step < std::min(steps, (piece + 1) * kSegmentsPerPiece);
             ++step) {
          visit(segment(row, range, piece, step / parts, step % parts));
        }
      }
    });
  }

 private:
  Segment segment(int64_t row, int64_t range, int64_t piece, int64_t repeat, int64_t part) const {
    const int64_t first = range * gates_per_range;
    const int64_t gates = std::min(gates_per_range, blocks.gates_in_row - first);
    const int64_t skipped = part * kGateBlock;
    const int64_t gate = row * blocks.gates_in_row + first;
    return {blocks.row_start(row, repeat) + first * blocks.run + skipped, gate, gates,
            parts == 1 ? blocks.run : std::min(kGateBlock, blocks.run - skipped), gate * pieces + piece};
  }
};

}  // namespace pyprune
