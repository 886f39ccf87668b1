// x86-64 with AVX-512.
#if defined(__x86_64__)
#define LEVEL avx512
#if defined(PLAY_AVX512)  // a build for tests, which runs where the CPU has AVX2
#define LEVEL_TARGET "avx2,fma"
#else
#define LEVEL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#endif
#define REGISTER_BYTES 64
#define TILE_ROWS 8  // there are 32 registers: 16 of sums, 2 of B and 1 of A
#include "loops.h"
#endif
