// Any CPU: SSE2 on x86-64, NEON on arm64.
#define LEVEL baseline
#define REGISTER_BYTES 16
#if defined(__aarch64__)
#define TILE_ROWS_OF_THIS_CPU 8
#else
#define TILE_ROWS_OF_THIS_CPU 6
#endif
#include "level.h"
