// Python's module _C: what takes no tensor. Importing it also registers the CPU operators. Five small functions in
// Python's own interface: a library for bindings would compile longer than any kernel.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>
#include <exception>
#include <string>

#include "cpu/bracket.h"
#include "cpu/capability.h"

#define PYPRUNE_STRING(x) #x
#define PYPRUNE_QUOTE(x) PYPRUNE_STRING(x)

#if defined(__clang__)
#define PYPRUNE_COMPILER "clang " PYPRUNE_QUOTE(__clang_major__) "." PYPRUNE_QUOTE(__clang_minor__)
#else
#define PYPRUNE_COMPILER "g++ " __VERSION__
#endif
#ifdef PYPRUNE_X86
#define PYPRUNE_CAPABILITIES "default, avx2, avx512"
#else
#define PYPRUNE_CAPABILITIES "default"
#endif

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{ss ss ss ss ss}", "version", PYPRUNE_VERSION, "built_with_torch", PYPRUNE_TORCH, "compiler",
                       PYPRUNE_COMPILER, "cpu_capabilities", PYPRUNE_CAPABILITIES, "cuda", PYPRUNE_CUDA_STATUS);
}

PyObject* cpu_capability(PyObject*, PyObject*) {
  return PyUnicode_FromString(pyprune::capability_name());
}

PyObject* available_cpu_capabilities(PyObject*, PyObject*) {
  PyObject* const names = PyList_New(0);
  for (const std::string& name : pyprune::available_capabilities()) {
    PyObject* const item = PyUnicode_FromString(name.c_str());
    if (names == nullptr || item == nullptr || PyList_Append(names, item) != 0) {
      Py_XDECREF(item);
      Py_XDECREF(names);
      return nullptr;
    }
    Py_DECREF(item);
  }
  return names;
}

PyObject* set_cpu_capability(PyObject*, PyObject* arguments) {
  const char* name;
  if (!PyArg_ParseTuple(arguments, "s:set_cpu_capability", &name)) {
    return nullptr;
  }
  try {
    pyprune::set_capability(name);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* shift_bracket(PyObject*, PyObject* arguments) {
  double sigmas;
  if (!PyArg_ParseTuple(arguments, "d:_shift_bracket", &sigmas)) {
    return nullptr;
  }
  pyprune::shift_bracket(sigmas);
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"build_info", build_info, METH_NOARGS, "What this module was built from and with."},
    {"cpu_capability", cpu_capability, METH_NOARGS, "The build of the CPU kernels that runs now."},
    {"available_cpu_capabilities", available_cpu_capabilities, METH_NOARGS, "Builds that run here, slowest first."},
    {"set_cpu_capability", set_cpu_capability, METH_VARARGS, "Choose a build, or 'auto'."},
    {"_shift_bracket", shift_bracket, METH_VARARGS,
     "Tests only: move the sampled bracket of the threshold off its place, to force the fallback."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  if (const char* name = std::getenv("PYPRUNE_CPU_CAPABILITY"); name != nullptr && *name != '\0') {
    try {
      pyprune::set_capability(name);
    } catch (const std::exception& error) {
      PyErr_Format(PyExc_ImportError, "PYPRUNE_CPU_CAPABILITY: %s", error.what());
      return nullptr;
    }
  }
  return PyModule_Create(&module);
}
