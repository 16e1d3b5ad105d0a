// pack, unpack: tensors as one bit per element and the values of those whose bit is set, in the order of the flat
// index, and back. Bits are found or counted first, so that all chunks of a list can be moved at the same time, and
// so that nothing is allocated for bits that do not fit their values.
#include "kernels/pack.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../pack_check.h"
#include "capability.h"
#include "huge_pages.h"
#include "parallel.h"
#include "strided.h"

namespace pyprune {
namespace {

using torch::stable::Tensor;

// The chunks of tensors of so many elements, how many bits are set in each, and how many of its tensor before it.
struct Bits {
  explicit Bits(const std::vector<int64_t>& counts) : in_tensor(counts.size()) {
    for (size_t i = 0; i < counts.size(); ++i) {
      elements += counts[i];
      for (int64_t start = 0; start < counts[i]; start += kChunk) {
        chunks.push_back({static_cast<int64_t>(i), start, std::min(kChunk, counts[i] - start)});
      }
    }
    in_chunk.resize(chunks.size());
    before.resize(chunks.size());
  }

  // Calls run(chunk, its number) for all.
  template <class Run>
  void for_each(const Run& run) const {
    share_tasks(static_cast<int64_t>(chunks.size()), elements,
                [&](int64_t task, int64_t) { run(chunks[task], static_cast<size_t>(task)); });
  }

  // What count(chunk) returns is in each.
  template <class Count>
  void count(const Count& count) {
    for_each([&](const Chunk& chunk, size_t number) { in_chunk[number] = count(chunk); });
    for (size_t number = 0; number < chunks.size(); ++number) {
      int64_t& total = in_tensor[chunks[number].tensor];
      before[number] = total;
      total += in_chunk[number];
    }
  }

  int64_t elements = 0;
  std::vector<Chunk> chunks;
  std::vector<int64_t> in_chunk, before, in_tensor;
};

// What is unpacked usually stays, so that malloc has nothing to hand out again.
constexpr int64_t kWorthHugePages = int64_t{1} << 25;

Tensor new_tensor(const Tensor& like, int64_t count, std::optional<torch::headeronly::ScalarType> dtype) {
  Tensor tensor = torch::stable::new_empty(like, {&count, 1}, dtype);
  prefer_huge_pages(tensor.mutable_data_ptr(), count * static_cast<int64_t>(tensor.element_size()), kWorthHugePages);
  return tensor;
}

template <class T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> pack(const std::vector<Tensor> tensors,
                                                          const std::vector<Tensor> masks, bool negative_zeros) {
  check_pack(tensors, masks);
  std::vector<int64_t> counts;
  std::vector<Tensor> bits, values;
  for (const Tensor& tensor : tensors) {
    check_on_cpu(tensor);
    counts.push_back(tensor.numel());
    bits.push_back(new_tensor(tensor, (tensor.numel() + 7) / 8, torch::headeronly::ScalarType::Byte));
  }
  Bits found(counts);
  found.count([&, run = PYPRUNE_KERNEL(pack_bits)](const Chunk& chunk) {
    const Tensor& tensor = masks.empty() ? tensors[chunk.tensor] : masks[chunk.tensor];
    const int64_t size = tensor.element_size();
    return run(data_of<char>(tensor) + chunk.start * size, size, significant_bits(tensor, negative_zeros),
               static_cast<uint8_t*>(bits[chunk.tensor].mutable_data_ptr()) + chunk.start / 8, chunk.count);
  });
  for (size_t i = 0; i < tensors.size(); ++i) {
    values.push_back(new_tensor(tensors[i], found.in_tensor[i], std::nullopt));
  }
  found.for_each([&, run = PYPRUNE_KERNEL(pack_values)](const Chunk& chunk, size_t number) {
    const int64_t size = tensors[chunk.tensor].element_size();
    run(data_of<char>(tensors[chunk.tensor]) + chunk.start * size, size,
        data_of<uint8_t>(bits[chunk.tensor]) + chunk.start / 8,
        static_cast<char*>(values[chunk.tensor].mutable_data_ptr()) + found.before[number] * size, chunk.count,
        found.in_chunk[number]);
  });
  return {bits, values};
}

std::vector<Tensor> unpack(const std::vector<Tensor> bits, const std::vector<Tensor> values,
                           const std::vector<int64_t> counts) {
  check_unpack(bits, values, counts);
  for (size_t i = 0; i < bits.size(); ++i) {
    check_on_cpu(bits[i]);
    check_on_cpu(values[i]);
    STD_TORCH_CHECK(counts[i] % 8 == 0 || data_of<uint8_t>(bits[i])[counts[i] / 8] >> (counts[i] % 8) == 0,
                    "bits behind the last element must be 0");
  }
  Bits found(counts);
  found.count([&, run = PYPRUNE_KERNEL(count_bits)](const Chunk& chunk) {
    return run(data_of<uint8_t>(bits[chunk.tensor]) + chunk.start / 8, (chunk.count + 7) / 8);
  });
  std::vector<Tensor> tensors;
  for (size_t i = 0; i < bits.size(); ++i) {
    STD_TORCH_CHECK(found.in_tensor[i] == values[i].numel(), "there must be as many values as bits that are set");
  }
  for (size_t i = 0; i < bits.size(); ++i) {
    tensors.push_back(new_tensor(values[i], counts[i], std::nullopt));
  }
  found.for_each([&, run = PYPRUNE_KERNEL(unpack_values)](const Chunk& chunk, size_t number) {
    const int64_t size = values[chunk.tensor].element_size();
    run(data_of<uint8_t>(bits[chunk.tensor]) + chunk.start / 8,
        data_of<char>(values[chunk.tensor]) + found.before[number] * size, size,
        static_cast<char*>(tensors[chunk.tensor].mutable_data_ptr()) + chunk.start * size, chunk.count,
        found.in_chunk[number]);
  });
  return tensors;
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("pack", TORCH_BOX(&pyprune::pack));
  m.impl("unpack", TORCH_BOX(&pyprune::unpack));
}
