// The CUDA operators on CPU tensors, run by csrc/cuda/emulation.h: torch.ops.dyhead_emulated.

#include <torch/csrc/stable/library.h>

#include "../../csrc/cuda/operators.h"
#include "../../csrc/schemas.h"

STABLE_TORCH_LIBRARY(dyhead_emulated, library) { dyhead::define_operators(library); }
STABLE_TORCH_LIBRARY_IMPL(dyhead_emulated, CPU, library) { dyhead::cuda::implement_operators(library); }
