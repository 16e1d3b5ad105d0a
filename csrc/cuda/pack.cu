#include <tuple>

#include "../pack_check.h"
#include "kernels/pack.cuh"
#include "upload.cuh"

namespace pyprune {
namespace {

// Calls use(T{}) with the unsigned integer of so many bytes.
template <class Use>
void with_size(int64_t size, const Use& use) {
  switch (size) {
    case 1: return use(uint8_t{});
    case 2: return use(uint16_t{});
    case 4: return use(uint32_t{});
    default: return use(uint64_t{});
  }
}

void check_device(const Tensor& tensor, const Tensor& first) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == first.get_device_index(),
                  "all tensors must be on one CUDA device");
}

// The last of the sums; waits for the device.
int64_t total(const DeviceArray<int64_t>& tiles, int64_t count, cudaStream_t stream) {
  int64_t sum = 0;
  check_cuda(cudaMemcpyAsync(&sum, tiles.data + pack_tiles(count), sizeof(sum), cudaMemcpyDeviceToHost, stream));
  check_cuda(cudaStreamSynchronize(stream));
  return sum;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> pack(const std::vector<Tensor>& tensors,
                                                          const std::vector<Tensor>& masks, bool negative_zeros) {
  check_pack(tensors, masks);
  std::vector<Tensor> bits, values;
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_device(tensors[i], tensors[0]);
    const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
    const cudaStream_t stream = current_stream(tensors[0]);
    const int64_t count = tensors[i].numel();
    bits.push_back(new_vector(tensors[i], (count + 7) / 8, ScalarType::Byte));
    uint8_t* const row = static_cast<uint8_t*>(bits[i].mutable_data_ptr());
    const DeviceArray<int64_t> tiles(tensors[i], pack_tiles(count) + 1);
    const Tensor& found = masks.empty() ? tensors[i] : masks[i];
    with_size(found.element_size(), [&](auto zero) {
      using T = decltype(zero);
      launch_pack_bits(static_cast<const T*>(found.const_data_ptr()),
                       static_cast<T>(significant_bits(found, negative_zeros)), count, row, tiles.data, stream);
    });
    values.push_back(new_vector(tensors[i], total(tiles, count, stream), tensors[i].scalar_type()));
    with_size(tensors[i].element_size(), [&](auto zero) {
      using T = decltype(zero);
      launch_move_values<true>(static_cast<T*>(const_cast<void*>(tensors[i].const_data_ptr())), row, count,
                               tiles.data, static_cast<T*>(values[i].mutable_data_ptr()), stream);
    });
  }
  return {bits, values};
}

// Writes tensor i of so many elements, to where place(i) says once its bits were counted.
template <class Place>
void spread(const std::vector<Tensor>& bits, const std::vector<Tensor>& values, const std::vector<int64_t>& counts,
            const Place& place) {
  check_unpack(bits, values, counts);
  for (size_t i = 0; i < bits.size(); ++i) {
    check_device(bits[i], bits[0]);
    const torch::stable::accelerator::DeviceGuard guard(bits[0].get_device_index());
    const cudaStream_t stream = current_stream(bits[0]);
    const uint8_t* const row = static_cast<const uint8_t*>(bits[i].const_data_ptr());
    if (counts[i] % 8 != 0) {
      uint8_t last = 0;
      check_cuda(cudaMemcpyAsync(&last, row + counts[i] / 8, 1, cudaMemcpyDeviceToHost, stream));
      check_cuda(cudaStreamSynchronize(stream));
      STD_TORCH_CHECK(last >> (counts[i] % 8) == 0, "bits behind the last element must be 0");
    }
    const DeviceArray<int64_t> tiles(bits[i], pack_tiles(counts[i]) + 1);
    launch_count_bits(row, counts[i], tiles.data, stream);
    STD_TORCH_CHECK(total(tiles, counts[i], stream) == values[i].numel(),
                    "there must be as many values as bits that are set");
    void* const data = place(i);
    with_size(values[i].element_size(), [&](auto zero) {
      using T = decltype(zero);
      launch_move_values<false>(static_cast<T*>(data), row, counts[i], tiles.data,
                                static_cast<T*>(const_cast<void*>(values[i].const_data_ptr())), stream);
    });
  }
}

std::vector<Tensor> unpack(const std::vector<Tensor>& bits, const std::vector<Tensor>& values,
                           const std::vector<int64_t>& counts) {
  std::vector<Tensor> tensors;
  spread(bits, values, counts, [&](size_t i) {
    tensors.push_back(new_vector(values[i], counts[i], values[i].scalar_type()));
    return tensors[i].mutable_data_ptr();
  });
  return tensors;
}

void unpack_into(const std::vector<Tensor>& bits, const std::vector<Tensor>& values, const std::vector<Tensor>& out) {
  spread(bits, values, check_unpack_into(values, out), [&](size_t i) { return out[i].mutable_data_ptr(); });
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) {
  m.impl("pack", TORCH_BOX(&pyprune::pack));
  m.impl("unpack", TORCH_BOX(&pyprune::unpack));
  m.impl("unpack_into", TORCH_BOX(&pyprune::unpack_into));
}
