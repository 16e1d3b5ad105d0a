// pybind11 module _C: what takes no tensor. Importing it also registers the CPU operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>

#include "cpu/bracket.h"
#include "cpu/capability.h"

#define PYPRUNE_STRING(x) #x
#define PYPRUNE_QUOTE(x) PYPRUNE_STRING(x)

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  if (const char* name = std::getenv("PYPRUNE_CPU_CAPABILITY"); name != nullptr && *name != '\0') {
    try {
      pyprune::set_capability(name);
    } catch (const std::invalid_argument& error) {
      throw py::import_error(std::string("PYPRUNE_CPU_CAPABILITY: ") + error.what());
    }
  }
  m.def("build_info", [] {
    py::dict info;
    info["version"] = PYPRUNE_VERSION;
    info["built_with_torch"] = PYPRUNE_TORCH;
#if defined(__clang__)
    info["compiler"] = "clang " PYPRUNE_QUOTE(__clang_major__) "." PYPRUNE_QUOTE(__clang_minor__);
#else
    info["compiler"] = "g++ " __VERSION__;
#endif
#ifdef PYPRUNE_X86
    info["cpu_capabilities"] = "default, avx2, avx512";
#else
    info["cpu_capabilities"] = "default";
#endif
    info["cuda"] = PYPRUNE_CUDA_STATUS;
    return info;
  });
  m.def("cpu_capability", &pyprune::capability_name, "The build of the CPU kernels that runs now.");
  m.def("available_cpu_capabilities", &pyprune::available_capabilities, "Builds that run here, slowest first.");
  m.def("set_cpu_capability", &pyprune::set_capability, py::arg("name"), "Choose a build, or 'auto'.");
  m.def("_shift_bracket", &pyprune::shift_bracket, py::arg("sigmas"),
        "Tests only: move the sampled bracket of the threshold off its place, to force the fallback.");
}
