#include "capability.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace pyprune {
namespace {

const std::vector<std::string> kNames = {"default", "avx2", "avx512"};

Capability detect() {
#ifdef PYPRUNE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? Capability::kAvx512 : avx2 ? Capability::kAvx2 : Capability::kDefault;
#else
  return Capability::kDefault;
#endif
}

const Capability detected = detect();
std::atomic<Capability> chosen{detected};

}  // namespace

Capability capability() {
  return chosen.load(std::memory_order_relaxed);
}

const char* capability_name() {
  return kNames[static_cast<size_t>(capability())].c_str();
}

std::vector<std::string> available_capabilities() {
  return {kNames.begin(), kNames.begin() + static_cast<int>(detected) + 1};
}

void set_capability(const std::string& name) {
  if (name == "auto") {
    chosen = detected;
    return;
  }
  const auto available = available_capabilities();
  const auto found = std::find(available.begin(), available.end(), name);
  if (found == available.end()) {
    std::string message = "CPU capability '" + name + "' is not available here; allowed are auto";
    for (const auto& one : available) {
      message += ", " + one;
    }
    throw std::invalid_argument(message);
  }
  chosen = static_cast<Capability>(found - available.begin());
}

}  // namespace pyprune
