// x86-64 with AVX-512.
#if defined(__x86_64__)
#define LEVEL avx512
#define LEVEL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#define REGISTER_BYTES 64
#define TILE_ROWS_OF_THIS_CPU 8
#include "level.h"
#endif
