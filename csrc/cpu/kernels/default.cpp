// The inner loops for any machine of the architecture: 16 bytes are SSE2 on x86-64, NEON on aarch64.

#define DYHEAD_PATH default_path
#define DYHEAD_TARGET
#define DYHEAD_BYTES 16
#define DYHEAD_ROWS 6
#include "table.h"
