// x86-64 with AVX2 and FMA.
#if defined(__x86_64__)
#define LEVEL avx2
#define LEVEL_TARGET "avx2,fma"
#define REGISTER_BYTES 32
#define TILE_ROWS 6  // there are 16 registers: 12 of sums, 2 of B and 1 of A
#include "loops.h"
#endif
