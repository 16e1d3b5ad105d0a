// park, unpark: what masks drop goes from weights into tensors of its own, in the order of the flat index whatever
// the layout, and back. Masks are counted first, so that all chunks of a list can be moved at the same time.
#include "kernels/park.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>

#include "capability.h"
#include "huge_pages.h"
#include "kernels/count_zeros.h"
#include "parallel.h"
#include "tensors.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

// How many elements each chunk drops, how many its tensor drops before it, and how many each tensor drops.
struct Counts {
  std::vector<int64_t> in_chunk, before, in_tensor;
};

Counts count_dropped(const std::vector<Strided>& masks, const std::vector<Chunk>& chunks) {
  Counts counts{std::vector<int64_t>(chunks.size()), std::vector<int64_t>(chunks.size()),
                std::vector<int64_t>(masks.size())};
  const auto run = PYPRUNE_KERNEL(count_zeros_run);
  share_tasks(static_cast<int64_t>(chunks.size()), elements_of(masks), [&](int64_t task, int64_t) {
    const auto [tensor, start, count] = chunks[task];
    Room room;
    counts.in_chunk[task] = run(masks[tensor].in_a_row(start, count, room), Dtype::kBool, count);
  });
  for (size_t i = 0; i < chunks.size(); ++i) {
    counts.before[i] = counts.in_tensor[chunks[i].tensor];
    counts.in_tensor[chunks[i].tensor] += counts.in_chunk[i];
  }
  return counts;
}

// Calls run(row of weights, row of the mask, where the chunk's dropped elements are parked, chunk, how many) for all.
template <class Run>
void for_each_chunk(const std::vector<Strided>& weights, const std::vector<Strided>& masks,
                    const std::vector<Chunk>& chunks, const Counts& counts, const std::vector<char*>& parked,
                    const Run& run) {
  share_tasks(static_cast<int64_t>(chunks.size()), elements_of(weights), [&](int64_t task, int64_t) {
    const auto [tensor, start, count] = chunks[task];
    if (counts.in_chunk[task] == 0) {
      return;
    }
    const Strided& weight = weights[tensor];
    Room weight_room, mask_room;
    char* const row = weight.in_a_row(start, count, weight_room);
    run(row, reinterpret_cast<const uint8_t*>(masks[tensor].in_a_row(start, count, mask_room)),
        parked[tensor] + counts.before[task] * item_size(weight.dtype), weight.dtype, count, counts.in_chunk[task]);
    if (!weight.contiguous()) {
      weight.scatter(start, count, row);
    }
  });
}

// Let a tensor be another one, with its memory.
void become(const Tensor& tensor, const Tensor& other) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(tensor), torch::stable::detail::from(other)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::set_", "source_Tensor", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the result, which is to be freed
}

void park(const std::vector<Tensor> weights, const std::vector<Tensor> masks, const std::vector<Tensor> into) {
  check_weights(weights);
  check_masks(masks, weights);
  STD_TORCH_CHECK(into.size() == weights.size(), "expected a tensor for what is parked of each weight");
  const std::vector<Strided> w = strided_of(weights), m = strided_of(masks);
  const std::vector<Chunk> chunks = chunks_of(w);
  const Counts counts = count_dropped(m, chunks);
  std::vector<Tensor> parked;
  std::vector<char*> data;
  for (size_t i = 0; i < weights.size(); ++i) {
    parked.push_back(torch::stable::new_empty(weights[i], {counts.in_tensor[i]}));
    data.push_back(static_cast<char*>(parked[i].mutable_data_ptr()));
    prefer_huge_pages(data[i], counts.in_tensor[i] * item_size(w[i].dtype));
  }
  for_each_chunk(w, m, chunks, counts, data, PYPRUNE_KERNEL(park_run));
  for (size_t i = 0; i < into.size(); ++i) {
    become(into[i], parked[i]);
  }
}

void unpark(const std::vector<Tensor> weights, const std::vector<Tensor> masks, const std::vector<Tensor> parked) {
  check_weights(weights);
  check_masks(masks, weights);
  STD_TORCH_CHECK(parked.size() == weights.size(), "expected what is parked of each weight");
  const std::vector<Strided> w = strided_of(weights), m = strided_of(masks), p = strided_of(parked);
  const std::vector<Chunk> chunks = chunks_of(w);
  const Counts counts = count_dropped(m, chunks);
  std::vector<char*> data;
  for (size_t i = 0; i < weights.size(); ++i) {
    STD_TORCH_CHECK(p[i].dtype == w[i].dtype && p[i].contiguous() && p[i].numel == counts.in_tensor[i],
                    "what is parked must be as much as the mask drops, of the weight's dtype and contiguous");
    data.push_back(p[i].data);
  }
  for_each_chunk(w, m, chunks, counts, data, PYPRUNE_KERNEL(unpark_run));
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("park", TORCH_BOX(&pyprune::park));
  m.impl("unpark", TORCH_BOX(&pyprune::unpark));
}
