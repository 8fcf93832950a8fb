// The inner loops for x86-64 with AVX-512.

#if defined(__x86_64__)
#define DYHEAD_PATH avx512_path
#define DYHEAD_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define DYHEAD_BYTES 64
#define DYHEAD_ROWS 12
#include "table.h"
#endif
