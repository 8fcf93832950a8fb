// The inner loops of bfloat16 for x86-64 with AVX512-BF16.

#if defined(__x86_64__)
#define DYHEAD_PATH avx512_bf16_path
#define DYHEAD_TARGET __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define DYHEAD_BYTES 64
#define DYHEAD_ROWS 12
#define DYHEAD_PAIRS
#include "table.h"
#endif
