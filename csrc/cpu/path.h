// Which instruction set the CPU operator uses.

#pragma once

namespace dyhead::cpu {

enum class Path { kDefault, kAvx2, kAvx512 };

// The best that the machine has, chosen once. As for PyTorch's own kernels, the environment variable
// ATEN_CPU_CAPABILITY (default, avx2 or avx512) asks for a lesser one.
Path path();

const char* path_name(Path path);

}  // namespace dyhead::cpu
