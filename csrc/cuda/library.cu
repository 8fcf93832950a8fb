// Registers the CUDA operators, and says what was built.

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include "../operators.h"
#include "implementation.h"

STABLE_TORCH_LIBRARY_IMPL(dyhead, CUDA, library) {
  dyhead::Operators<dyhead::cuda::Implementation>::implement(library);
}

#define DYHEAD_TEXT_(...) #__VA_ARGS__
#define DYHEAD_TEXT(...) DYHEAD_TEXT_(__VA_ARGS__)

// For dyhead/ops/library.py.
extern "C" __attribute__((visibility("default"))) const char* dyhead_cuda_build_info() {
  return "CUDA " DYHEAD_TEXT(__CUDACC_VER_MAJOR__) "." DYHEAD_TEXT(__CUDACC_VER_MINOR__) ", architectures " DYHEAD_TEXT(
      __CUDA_ARCH_LIST__) ", PyTorch headers " DYHEAD_TEXT(TORCH_VERSION_MAJOR) "." DYHEAD_TEXT(TORCH_VERSION_MINOR);
}
