// Which instruction set the CPU operator uses.

#pragma once

namespace dyhead::cpu {

enum class Path { kDefault, kAvx2, kAvx512, kAvx512Bf16 };

// The best that the machine has, chosen once. As for PyTorch's own kernels, the environment variable
// ATEN_CPU_CAPABILITY (default, avx2 or avx512) asks for a lesser one; avx512 is that without AVX512-BF16's products of
// bfloat16.
Path path();

const char* path_name(Path path);

}  // namespace dyhead::cpu
