// Fresh memory costs a fault for each page of 4 KiB, which takes longer than filling it; huge ones are of 2 MiB.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace pyprune {

// Asks for huge pages under memory that nothing was written to yet, where malloc fetches it from the system at every
// call: from 32 MiB on. Smaller blocks it keeps and hands out again.
inline void prefer_huge_pages(void* data, int64_t bytes, int64_t least = int64_t{1} << 25) {
  if (bytes < least) {
    return;
  }
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace pyprune
