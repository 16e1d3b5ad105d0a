// A row of elements as one bit for each and the values of those whose bit is set, and back. Elements are bits of 1,
// 2, 4 or 8 bytes, whatever they mean.
//
// pack_bits: bit i (least significant first) says whether data[i] & significant is not 0; returns how many are set.
// Bits behind the last element are 0. Reads the data once, writes an eighth of a byte per element.
// pack_values: appends data[i] to `values` where bit i is set. unpack_values: the reverse, with zeros elsewhere.
// `kept` is how many bits are set; nothing is written or read behind them. Both move one item size per element, one
// per kept element, and the bits. Past the caches, memory does not read what is only written.
#pragma once

#include <cstdint>

#include "capability_namespace.h"

#define PYPRUNE_DECLARE_PACK                                                                                        \
  int64_t pack_bits(const void* data, int64_t size, uint64_t significant, uint8_t* bits, int64_t count);            \
  int64_t count_bits(const uint8_t* bits, int64_t bytes);                                                           \
  void pack_values(const void* data, int64_t size, const uint8_t* bits, void* values, int64_t count, int64_t kept); \
  void unpack_values(const uint8_t* bits, const void* values, int64_t size, void* out, int64_t count, int64_t kept, \
                     bool past_caches);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_PACK)
