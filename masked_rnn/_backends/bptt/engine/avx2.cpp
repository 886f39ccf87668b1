// x86-64 with AVX2 and FMA.
#if defined(__x86_64__)
#define LEVEL avx2
#define LEVEL_TARGET "avx2,fma"
#define REGISTER_BYTES 32
#define TILE_ROWS_OF_THIS_CPU 6
#include "level.h"
#endif
