// Which weights share a gate. Each size of the logits divides the weight's, and neighbours share: a weight dimension
// of size l * b is l gates of b weights each. In C order the weight is then a nest of loops, each over gates or over
// repeats of them; loops of one kind that follow each other are merged.
#pragma once

#include <cstdint>
#include <vector>

namespace pyprune {

struct GateBlocks {
  struct Loop {
    int64_t size;
    int64_t weight_step;  // in elements of the weight in C order
  };

  // The innermost two loops: `gates_in_row` gates, each on `run` neighbours. Rows are contiguous in C order.
  int64_t gates_in_row = 1;
  int64_t run = 1;
  // What lies around them, outermost first. Row number r (over `gate_loops`, last fastest) has gates
  // [r * gates_in_row, (r + 1) * gates_in_row), and lies in the weight once for each step of `repeat_loops`.
  std::vector<Loop> gate_loops;
  std::vector<Loop> repeat_loops;

  // Whether logits of these sizes can gate such a weight.
  static bool fit(const int64_t* weight_sizes, int64_t weight_dims, const int64_t* gate_sizes, int64_t gate_dims) {
    bool all = weight_dims == gate_dims;
    for (int64_t d = 0; all && d < weight_dims; ++d) {
      all = weight_sizes[d] == gate_sizes[d] || (gate_sizes[d] > 0 && weight_sizes[d] % gate_sizes[d] == 0);
    }
    return all;
  }

  GateBlocks(const int64_t* weight_sizes, const int64_t* gate_sizes, int64_t dims) {
    struct Nested {
      bool gates;
      int64_t size;
      int64_t step;
    };
    std::vector<Nested> nest;  // innermost first
    int64_t step = 1;
    const auto add = [&](bool gates, int64_t size) {
      if (size != 1) {
        if (!nest.empty() && nest.back().gates == gates) {
          nest.back().size *= size;
        } else {
          nest.push_back({gates, size, step});
        }
        step *= size;
      }
    };
    for (int64_t d = dims - 1; d >= 0; --d) {
      add(false, gate_sizes[d] == 0 ? 1 : weight_sizes[d] / gate_sizes[d]);
      add(true, gate_sizes[d]);
    }
    size_t inner = 0;
    if (inner < nest.size() && !nest[inner].gates) {
      run = nest[inner++].size;
    }
    if (inner < nest.size() && nest[inner].gates) {
      gates_in_row = nest[inner++].size;
    }
    for (size_t i = nest.size(); i > inner; --i) {
      (nest[i - 1].gates ? gate_loops : repeat_loops).push_back({nest[i - 1].size, nest[i - 1].step});
    }
  }

  bool one_per_weight() const { return run == 1 && gate_loops.empty() && repeat_loops.empty(); }
  int64_t row_length() const { return gates_in_row * run; }
  int64_t rows() const { return total(gate_loops); }
  int64_t repeats() const { return total(repeat_loops); }

  // Where the row lies in the weight, in elements in C order.
  int64_t row_start(int64_t row, int64_t repeat) const {
    return offset(gate_loops, row) + offset(repeat_loops, repeat);
  }

 private:
  static int64_t total(const std::vector<Loop>& loops) {
    int64_t product = 1;
    for (const Loop& loop : loops) {
      product *= loop.size;
    }
    return product;
  }
  static int64_t offset(const std::vector<Loop>& loops, int64_t index) {
    int64_t sum = 0;
    for (size_t i = loops.size(); i > 0; --i) {
      sum += index % loops[i - 1].size * loops[i - 1].weight_step;
      index /= loops[i - 1].size;
    }
    return sum;
  }
};

}  // namespace pyprune
