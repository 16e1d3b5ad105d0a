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

// What is packed or unpacked usually stays, so that malloc has nothing to hand out again: tensors of 16 MiB are
// unpacked in half the time into huge pages.
constexpr int64_t kWorthHugePages = int64_t{1} << 21;
// Bytes per thread of tensors that are packed at a time, so that values are read from the cache that bits were.
constexpr int64_t kInCache = int64_t{1} << 22;
// Fewer bytes are worth keeping in the cache for whoever reads them.
constexpr int64_t kPastCaches = int64_t{1} << 23;

Tensor new_tensor(const Tensor& like, int64_t count, std::optional<torch::headeronly::ScalarType> dtype) {
  Tensor tensor = torch::stable::new_empty(like, {&count, 1}, dtype);
  prefer_huge_pages(tensor.mutable_data_ptr(), count * static_cast<int64_t>(tensor.element_size()), kWorthHugePages);
  return tensor;
}

template <class T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Appends the bits and values of tensors [first, last) to those of the tensors before.
void pack_some(const std::vector<Tensor>& tensors, const std::vector<Tensor>& masks, bool negative_zeros,
               size_t first, size_t last, std::vector<Tensor>& bits, std::vector<Tensor>& values) {
  std::vector<int64_t> counts;
  for (size_t i = first; i < last; ++i) {
    counts.push_back(tensors[i].numel());
    bits.push_back(new_tensor(tensors[i], (tensors[i].numel() + 7) / 8, torch::headeronly::ScalarType::Byte));
  }
  Bits found(counts);
  found.count([&, run = PYPRUNE_KERNEL(pack_bits)](const Chunk& chunk) {
    const size_t i = first + chunk.tensor;
    const Tensor& tensor = masks.empty() ? tensors[i] : masks[i];
    const int64_t size = tensor.element_size();
    return run(data_of<char>(tensor) + chunk.start * size, size, significant_bits(tensor, negative_zeros),
               static_cast<uint8_t*>(bits[i].mutable_data_ptr()) + chunk.start / 8, chunk.count);
  });
  for (size_t i = first; i < last; ++i) {
    values.push_back(new_tensor(tensors[i], found.in_tensor[i - first], std::nullopt));
  }
  found.for_each([&, run = PYPRUNE_KERNEL(pack_values)](const Chunk& chunk, size_t number) {
    const size_t i = first + chunk.tensor;
    const int64_t size = tensors[i].element_size();
    run(data_of<char>(tensors[i]) + chunk.start * size, size, data_of<uint8_t>(bits[i]) + chunk.start / 8,
        static_cast<char*>(values[i].mutable_data_ptr()) + found.before[number] * size, chunk.count,
        found.in_chunk[number]);
  });
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> pack(const std::vector<Tensor> tensors,
                                                          const std::vector<Tensor> masks, bool negative_zeros) {
  check_pack(tensors, masks);
  for (const Tensor& tensor : tensors) {
    check_on_cpu(tensor);
  }
  std::vector<Tensor> bits, values;
  for (size_t first = 0, last; first < tensors.size(); first = last) {
    int64_t bytes = 0;
    for (last = first; last < tensors.size() && (last == first || bytes <= kInCache * thread_count()); ++last) {
      bytes += tensors[last].numel() * tensors[last].element_size();
    }
    pack_some(tensors, masks, negative_zeros, first, last, bits, values);
  }
  return {bits, values};
}

void count_in(const std::vector<Tensor>& rows, Bits& found) {
  found.count([&, run = PYPRUNE_KERNEL(count_bits)](const Chunk& chunk) {
    return run(data_of<uint8_t>(rows[chunk.tensor]) + chunk.start / 8, (chunk.count + 7) / 8);
  });
}

Tensor count_bits(const std::vector<Tensor> rows) {
  std::vector<int64_t> counts;
  for (const Tensor& row : rows) {
    check_packable(row);
    check_on_cpu(row);
    STD_TORCH_CHECK(row.element_size() == 1, "bits must be bytes");
    counts.push_back(8 * row.numel());
  }
  Bits found(counts);
  count_in(rows, found);
  Tensor result = torch::stable::empty({static_cast<int64_t>(rows.size())}, torch::headeronly::ScalarType::Long);
  std::copy(found.in_tensor.begin(), found.in_tensor.end(), static_cast<int64_t*>(result.mutable_data_ptr()));
  return result;
}

// Counts the bits of rows, which must be those of so many elements and of as many values.
Bits counted(const std::vector<Tensor>& bits, const std::vector<Tensor>& values, const std::vector<int64_t>& counts) {
  check_unpack(bits, values, counts);
  for (size_t i = 0; i < bits.size(); ++i) {
    check_on_cpu(bits[i]);
    check_on_cpu(values[i]);
    STD_TORCH_CHECK(counts[i] % 8 == 0 || data_of<uint8_t>(bits[i])[counts[i] / 8] >> (counts[i] % 8) == 0,
                    "bits behind the last element must be 0");
  }
  Bits found(counts);
  count_in(bits, found);
  for (size_t i = 0; i < bits.size(); ++i) {
    STD_TORCH_CHECK(found.in_tensor[i] == values[i].numel(), "there must be as many values as bits that are set");
  }
  return found;
}

void spread(const Bits& found, const std::vector<Tensor>& bits, const std::vector<Tensor>& values,
            const std::vector<Tensor>& tensors, bool past_caches) {
  found.for_each([&, run = PYPRUNE_KERNEL(unpack_values)](const Chunk& chunk, size_t number) {
    const int64_t size = values[chunk.tensor].element_size();
    run(data_of<uint8_t>(bits[chunk.tensor]) + chunk.start / 8,
        data_of<char>(values[chunk.tensor]) + found.before[number] * size, size,
        static_cast<char*>(tensors[chunk.tensor].mutable_data_ptr()) + chunk.start * size, chunk.count,
        found.in_chunk[number], past_caches);
  });
}

std::vector<Tensor> unpack(const std::vector<Tensor> bits, const std::vector<Tensor> values,
                           const std::vector<int64_t> counts) {
  const Bits found = counted(bits, values, counts);
  std::vector<Tensor> tensors;
  for (size_t i = 0; i < bits.size(); ++i) {
    tensors.push_back(new_tensor(values[i], counts[i], std::nullopt));
  }
  // New pages were zeroed just now, and are in the cache.
  spread(found, bits, values, tensors, false);
  return tensors;
}

void unpack_into(const std::vector<Tensor> bits, const std::vector<Tensor> values, const std::vector<Tensor> out) {
  const std::vector<int64_t> counts = check_unpack_into(values, out);
  const Bits found = counted(bits, values, counts);
  int64_t bytes = 0;
  for (const Tensor& tensor : out) {
    bytes += tensor.numel() * tensor.element_size();
  }
  spread(found, bits, values, out, bytes >= kPastCaches);
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("pack", TORCH_BOX(&pyprune::pack));
  m.impl("unpack", TORCH_BOX(&pyprune::unpack));
  m.impl("count_bits", TORCH_BOX(&pyprune::count_bits));
  m.impl("unpack_into", TORCH_BOX(&pyprune::unpack_into));
}
