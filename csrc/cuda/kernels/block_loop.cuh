// How a block of threads walks elements of one tensor: 16-byte packs, several loads in flight per thread.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "tensor_table.cuh"

namespace pyprune {

constexpr int kLoadsInFlight = 4;
constexpr int kSinglesInFlight = 2;  // each may hold the registers of a division
constexpr unsigned kWholeWarp = 0xffffffffu;

// What a weight's bits mean, and the bits of a number rounded to the nearest weight.
struct Float32 {
  static constexpr Dtype kDtype = Dtype::kFloat32;
  static constexpr uint64_t kInfinity = infinity_bits(kDtype);
  using Bits = uint32_t;
  using Value = float;
  __device__ static float value(Bits bits) { return __uint_as_float(bits); }
  __device__ static Bits bits(float value) { return __float_as_uint(value); }
};
struct Float64 {
  static constexpr Dtype kDtype = Dtype::kFloat64;
  static constexpr uint64_t kInfinity = infinity_bits(kDtype);
  using Bits = uint64_t;
  using Value = double;
  __device__ static double value(Bits bits) { return __longlong_as_double(static_cast<long long>(bits)); }
  __device__ static Bits bits(double value) { return static_cast<Bits>(__double_as_longlong(value)); }
};
struct Float16 {
  static constexpr Dtype kDtype = Dtype::kFloat16;
  static constexpr uint64_t kInfinity = infinity_bits(kDtype);
  using Bits = uint16_t;
  using Value = float;
  __device__ static float value(Bits bits) { return __half2float(__ushort_as_half(bits)); }
  __device__ static Bits bits(float value) { return __half_as_ushort(__float2half_rn(value)); }
};
struct BFloat16 {
  static constexpr Dtype kDtype = Dtype::kBFloat16;
  static constexpr uint64_t kInfinity = infinity_bits(kDtype);
  using Bits = uint16_t;
  using Value = float;
  __device__ static float value(Bits bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
  __device__ static Bits bits(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
};

// N unsigned integers that move with one load or store. They are kept as words and taken apart on use: an array of
// bytes or halves would take a register for each while its load is in flight.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  using Word =
      std::conditional_t<sizeof(T) * N >= 4, uint32_t, std::conditional_t<sizeof(T) * N == 2, uint16_t, uint8_t>>;
  static constexpr int kPerWord = sizeof(Word) / sizeof(T);  // 0 for T wider than a word
  static constexpr int kBits = 8 * sizeof(T);
  Word words[sizeof(T) * N / sizeof(Word)];

  __device__ T get(int i) const {
    if constexpr (kPerWord == 0) {
      return words[2 * i] | static_cast<T>(words[2 * i + 1]) << 32;
    } else {
      return static_cast<T>(words[i / kPerWord] >> i % kPerWord * kBits);
    }
  }
  __device__ void set_in_zeros(int i, T value) {
    if constexpr (kPerWord == 0) {
      words[2 * i] = static_cast<Word>(value);
      words[2 * i + 1] = static_cast<Word>(value >> 32);
    } else {
      words[i / kPerWord] |= static_cast<Word>(Word{value} << i % kPerWord * kBits);
    }
  }
  __device__ void clear(int i) {
    if constexpr (kPerWord == 0) {
      words[2 * i] = words[2 * i + 1] = 0;
    } else {
      words[i / kPerWord] &= static_cast<Word>(~(Word{static_cast<T>(~T{0})} << i % kPerWord * kBits));
    }
  }
};

// Tells a generic lambda how many elements it is given at once (integral_constant converts on the host only).
template <int N>
struct Width {
  static constexpr int value = N;
};

template <typename T>
constexpr int kPackWidth = 16 / sizeof(T);

// The compiler cannot tell that pointers from a table are to device memory, and would ask each time.
template <int N, typename T>
__device__ inline Pack<T, N> load_pack(const T* address) {
  __builtin_assume(__isGlobal(address));
  return *reinterpret_cast<const Pack<T, N>*>(address);
}

template <int N, typename T>
__device__ inline void store_pack(T* address, const Pack<T, N>& pack) {
  __builtin_assume(__isGlobal(address));
  *reinterpret_cast<Pack<T, N>*>(address) = pack;
}

// Elements [begin, end), of which [packs_begin, packs_end) may be loaded 16 bytes at a time.
struct Span {
  int64_t begin;
  int64_t packs_begin;
  int64_t packs_end;
  int64_t end;
};

// `linear`: the elements lie one after the other from `data`; otherwise all of them are met one by one.
template <typename T>
__device__ inline Span make_span(const T* data, bool linear, int64_t begin, int64_t end) {
  if (!linear) return {begin, begin, begin, end};
  const int64_t beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data + begin) % 16 / sizeof(T));
  const int64_t head = begin + (beyond == 0 ? 0 : kPackWidth<T> - beyond);
  const int64_t packs_begin = head < end ? head : end;
  return {begin, packs_begin, packs_begin + (end - packs_begin) / kPackWidth<T> * kPackWidth<T>, end};
}

// The same for a tensor and its partner that packs of both must suit: no packs where the two are aligned differently.
template <typename T, typename U>
__device__ inline Span make_span(const T* data, const U* partner, bool linear, int64_t begin, int64_t end) {
  const Span span = make_span(data, linear, begin, end);
  const bool alike = reinterpret_cast<uintptr_t>(partner + span.packs_begin) % (sizeof(U) * kPackWidth<T>) == 0;
  return alike ? span : Span{begin, begin, begin, end};
}

// Makes all loads so far start before what follows: the compiler would move them to where they are needed.
__device__ inline void keep_loads_above() {
  asm volatile("" ::: "memory");
}

// Calls use(width, position, load(width, position)) for every pack, then for every single element, of the span.
template <typename T, int kLoads = kLoadsInFlight, typename Load, typename Use>
__device__ inline void visit(const Span& span, const Load& load, const Use& use) {
  const Width<kPackWidth<T>> pack{};
  const int64_t stride = static_cast<int64_t>(blockDim.x) * kPackWidth<T>;
  int64_t at = span.packs_begin + static_cast<int64_t>(threadIdx.x) * kPackWidth<T>;
#pragma unroll 1
  for (; at + (kLoads - 1) * stride < span.packs_end; at += kLoads * stride) {
    decltype(load(pack, at)) items[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) items[i] = load(pack, at + i * stride);
    keep_loads_above();
#pragma unroll
    for (int i = 0; i < kLoads; ++i) use(pack, at + i * stride, items[i]);
  }
#pragma unroll 1
  for (; at < span.packs_end; at += stride) use(pack, at, load(pack, at));

  const Width<1> one{};
  const int64_t head = span.packs_begin - span.begin;
  const int64_t singles = head + (span.end - span.packs_end);
  const auto position = [&](int64_t single) {
    return single < head ? span.begin + single : span.packs_end + (single - head);
  };
#pragma unroll 1
  for (at = threadIdx.x; at < singles; at += kSinglesInFlight * blockDim.x) {
    decltype(load(one, at)) items[kSinglesInFlight];
#pragma unroll
    for (int i = 0; i < kSinglesInFlight; ++i) {
      const int64_t single = at + static_cast<int64_t>(i) * blockDim.x;
      if (single < singles) items[i] = load(one, position(single));
    }
#pragma unroll
    for (int i = 0; i < kSinglesInFlight; ++i) {
      const int64_t single = at + static_cast<int64_t>(i) * blockDim.x;
      if (single < singles) use(one, position(single), items[i]);
    }
  }
}

// Calls body(T{}) with what the bits of a weight mean.
template <bool kWithDouble = true, typename Body>
__device__ inline void with_weight_type(Dtype dtype, const Body& body) {
  if (dtype == Dtype::kFloat32) {
    body(Float32{});
  } else if (dtype == Dtype::kFloat16) {
    body(Float16{});
  } else if (dtype == Dtype::kBFloat16) {
    body(BFloat16{});
  } else if constexpr (kWithDouble) {
    if (dtype == Dtype::kFloat64) body(Float64{});
  }
}

// Calls body(T{}) with the unsigned integer as wide as an element, for work on bits alone.
template <typename Body>
__device__ inline void with_bits(Dtype dtype, const Body& body) {
  if (dtype == Dtype::kFloat32) {
    body(uint32_t{});
  } else if (dtype == Dtype::kFloat64) {
    body(uint64_t{});
  } else if (dtype == Dtype::kBool) {
    body(uint8_t{});
  } else {
    body(uint16_t{});
  }
}

// Every lane gets the sum over its warp; all lanes must call.
template <typename T>
__device__ inline T warp_sum(T value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kWholeWarp, value, distance);
  return value;
}

// Signed counters, which CUDA's 64-bit atomics do not know; two's complement addition is the same.
__device__ inline void atomic_add(int64_t* address, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value));
}

// Adds the values of all threads of the block to a global counter with one atomic; all threads must call.
__device__ inline void add_block_total(int64_t value, int64_t* counter) {
  __shared__ int64_t total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0 && value != 0) atomic_add(&total, value);
  __syncthreads();
  if (threadIdx.x == 0 && total != 0) atomic_add(counter, total);
  __syncthreads();  // the next call resets the total
}

// Sum of `value` over the threads before this one, and over all of them; all threads of the block must call.
struct Scan {
  int64_t before;
  int64_t total;
};

__device__ inline Scan scan_block(int64_t value) {
  __shared__ int64_t warps[32];
  const int lane = threadIdx.x % 32;
  int64_t inclusive = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t other = __shfl_up_sync(kWholeWarp, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  if (lane == 31) warps[threadIdx.x / 32] = inclusive;
  __syncthreads();
  Scan scan{inclusive - value, 0};
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) {
    if (warp < static_cast<int>(threadIdx.x) / 32) scan.before += warps[warp];
    scan.total += warps[warp];
  }
  __syncthreads();  // the next call writes again
  return scan;
}

// Whether this block is the last of the grid to come here: it then sees what all blocks did before. `arrived` is zero
// again afterwards. All threads must call.
__device__ inline bool is_last_block(unsigned* arrived) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    if (last) *arrived = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace pyprune
