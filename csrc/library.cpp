// Defines the operators, and registers the CPU's; the Python module that loads them and says what was built.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include "cpu/implementation.h"
#include "cpu/path.h"
#include "operators.h"

STABLE_TORCH_LIBRARY(dyhead, library) { dyhead::define_operators(library); }

STABLE_TORCH_LIBRARY_IMPL(dyhead, CPU, library) { dyhead::Operators<dyhead::cpu::Implementation>::implement(library); }

namespace {

#define DYHEAD_TEXT_(text) #text
#define DYHEAD_TEXT(text) DYHEAD_TEXT_(text)

pybind11::dict build_info() {
  using pybind11::literals::operator""_a;
  constexpr unsigned long long target = TORCH_TARGET_VERSION;
  return pybind11::dict("compiler"_a =
#if defined(__clang__)
                            "Clang " __clang_version__,
#else
                            "GCC " __VERSION__,
#endif
                        "flags"_a = DYHEAD_FLAGS,
                        "torch_headers"_a = DYHEAD_TEXT(TORCH_VERSION_MAJOR) "." DYHEAD_TEXT(
                            TORCH_VERSION_MINOR) "." DYHEAD_TEXT(TORCH_VERSION_PATCH),
                        "torch_minimum"_a = std::to_string(target >> 56) + "." + std::to_string(target >> 48 & 0xff),
#if defined(__x86_64__)
                        "cpu_paths"_a = pybind11::make_tuple("default", "avx2", "avx512", "avx512_bf16"),
#else
                        "cpu_paths"_a = pybind11::make_tuple("default"),
#endif
                        "cpu_path"_a = dyhead::cpu::path_name(dyhead::cpu::path()));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled operator of dyhead.ops; importing it registers torch.ops.dyhead.";
  module.def("build_info", &build_info, "What this library was built with, and the instruction set that it uses here.");
}
