#include "path.h"

#include <cstdlib>
#include <string>

namespace dyhead::cpu {
namespace {

Path best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? Path::kAvx512Bf16 : Path::kAvx512;
  }
  if (avx2) return Path::kAvx2;
#endif
  return Path::kDefault;
}

Path choose() {
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string wish = variable == nullptr ? "" : variable;
  const Path limit = wish == "default"  ? Path::kDefault
                     : wish == "avx2"   ? Path::kAvx2
                     : wish == "avx512" ? Path::kAvx512
                                        : Path::kAvx512Bf16;
  return static_cast<int>(limit) < static_cast<int>(best()) ? limit : best();
}

}  // namespace

Path path() {
  static const Path chosen = choose();
  return chosen;
}

const char* path_name(Path path) {
  switch (path) {
    case Path::kAvx512Bf16:
      return "avx512_bf16";
    case Path::kAvx512:
      return "avx512";
    case Path::kAvx2:
      return "avx2";
    default:
      return "default";
  }
}

}  // namespace dyhead::cpu
