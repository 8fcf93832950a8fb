// Defines the operators, and registers the CPU's; the Python module that loads them and says what was built.

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <string>

#include "cpu/implementation.h"
#include "cpu/path.h"
#include "operators.h"

STABLE_TORCH_LIBRARY(dyhead, library) { dyhead::define_operators(library); }

STABLE_TORCH_LIBRARY_IMPL(dyhead, CPU, library) { dyhead::Operators<dyhead::cpu::Implementation>::implement(library); }

namespace {

#define DYHEAD_TEXT_(text) #text
#define DYHEAD_TEXT(text) DYHEAD_TEXT_(text)

PyObject* build_info(PyObject*, PyObject*) {
  constexpr unsigned long long target = TORCH_TARGET_VERSION;
  const std::string minimum = std::to_string(target >> 56) + "." + std::to_string(target >> 48 & 0xff);
#if defined(__x86_64__)
  PyObject* paths = Py_BuildValue("(ssss)", "default", "avx2", "avx512", "avx512_bf16");
#else
  PyObject* paths = Py_BuildValue("(s)", "default");
#endif
#if defined(__clang__)
  const char* compiler = "Clang " __clang_version__;
#else
  const char* compiler = "GCC " __VERSION__;
#endif
  const char* headers =
      DYHEAD_TEXT(TORCH_VERSION_MAJOR) "." DYHEAD_TEXT(TORCH_VERSION_MINOR) "." DYHEAD_TEXT(TORCH_VERSION_PATCH);
  const char* path = dyhead::cpu::path_name(dyhead::cpu::path());
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:N,s:s}", "compiler", compiler, "flags", DYHEAD_FLAGS, "torch_headers",
                       headers, "torch_minimum", minimum.c_str(), "cpu_paths", paths, "cpu_path", path);
}

PyMethodDef methods[] = {
    {"build_info", &build_info, METH_NOARGS,
     "What this library was built with, and the instruction set that it uses here."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "The compiled operator of dyhead.ops; importing it registers torch.ops.dyhead.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

// Python's stable ABI alone (Py_LIMITED_API), so that one build works with every Python.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&module); }
