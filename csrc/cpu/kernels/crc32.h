// CRC-32 as zlib computes it, of memory: the remainder of a polynomial whose highest coefficient is the lowest bit of
// the first byte. States are what is between bytes, without the inversions at both ends. Reads each byte once.
#pragma once

#include <cstdint>

#include "capability_namespace.h"

#define PYPRUNE_DECLARE_CRC32 uint32_t crc32_of(const uint8_t* data, int64_t bytes, uint32_t state);

PYPRUNE_FOR_EACH_CAPABILITY(PYPRUNE_DECLARE_CRC32)
