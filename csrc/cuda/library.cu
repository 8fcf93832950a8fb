// Registers the CUDA operators.

#include <torch/csrc/stable/library.h>

#include "operators.h"

STABLE_TORCH_LIBRARY_IMPL(dyhead, CUDA, library) { dyhead::cuda::implement_operators(library); }
