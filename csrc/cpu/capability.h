// Which build of the CPU kernels runs: detected once, overridden by PYPRUNE_CPU_CAPABILITY or by the caller.
#pragma once

#include <string>
#include <vector>

namespace pyprune {

enum class Capability { kDefault, kAvx2, kAvx512 };

Capability capability();
const char* capability_name();
// Names that this build holds and this machine can run, slowest first.
std::vector<std::string> available_capabilities();
// "auto" chooses the fastest. Throws std::invalid_argument for a name that is not available.
void set_capability(const std::string& name);

}  // namespace pyprune

// A kernel is declared once for every capability; `PYPRUNE_KERNEL(f)` is the one to call now.
#ifdef PYPRUNE_X86
#define PYPRUNE_KERNEL(function)                                                           \
  (::pyprune::capability() == ::pyprune::Capability::kAvx512 ? ::pyprune::avx512::function \
   : ::pyprune::capability() == ::pyprune::Capability::kAvx2 ? ::pyprune::avx2::function   \
                                                             : ::pyprune::portable::function)
#else
#define PYPRUNE_KERNEL(function) (::pyprune::portable::function)
#endif
