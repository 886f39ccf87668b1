// What differs from one kind of CPU to another: the namespace of its loops, a register's width, the rows of a tile, and
// the instructions that the compiler may use. avx2.cpp and avx512.cpp define these; any other file, and any header that
// is opened alone, is of the baseline.
//
// A header of the loops has its code between LEVEL_BEGIN and LEVEL_END, and its includes before, so that what is shared
// is compiled for any CPU. GCC 14 and newer drop code that follows a pragma in one macro, so neither has the namespace.
#pragma once

#if !defined(__GNUC__) && !defined(__clang__)
#error "The loops need the vector types of GCC and Clang. Without them the loops of PyTorch's ops run."
#endif

// setup.py turns these modes off. GCC says of all of them, and Clang of some, that they are on.
#if defined(__FAST_MATH__) || __FINITE_MATH_ONLY__ || (defined(__GCC_IEC_559) && !__GCC_IEC_559)
#error "Under -ffast-math, and under any part of it, the loops would give wrong numbers."
#endif

#if !defined(LEVEL)  // SSE2 on x86-64, NEON on arm64
#define LEVEL baseline
#define REGISTER_BYTES 16
#if defined(__aarch64__)
#define TILE_ROWS 8
#else
#define TILE_ROWS 6
#endif
#endif

#define LEVEL_PRAGMA(text) _Pragma(#text)
#if !defined(LEVEL_TARGET)
#define LEVEL_BEGIN
#define LEVEL_END
#elif defined(__clang__)
#define LEVEL_ATTRIBUTE(features) \
    LEVEL_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LEVEL_BEGIN LEVEL_ATTRIBUTE(LEVEL_TARGET)
#define LEVEL_END LEVEL_PRAGMA(clang attribute pop)
#else
#define LEVEL_OPTION(features) LEVEL_PRAGMA(GCC target(features))
#define LEVEL_BEGIN LEVEL_PRAGMA(GCC push_options) LEVEL_OPTION(LEVEL_TARGET)
#define LEVEL_END LEVEL_PRAGMA(GCC pop_options)
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))
#define NEVER_INLINE __attribute__((noinline))
#define SIMD _Pragma("omp simd")
