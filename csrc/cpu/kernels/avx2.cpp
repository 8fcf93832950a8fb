// The inner loops for x86-64 with AVX2 and FMA.

#if defined(__x86_64__)
#define DYHEAD_PATH avx2_path
#define DYHEAD_TARGET __attribute__((target("avx2,fma,f16c")))
#define DYHEAD_BYTES 32
#define DYHEAD_ROWS 6
#include "table.h"
#endif
