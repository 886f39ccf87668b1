// The loops for one kind of CPU: a namespace, a register's width, and the instructions that the compiler may use.
// Each of baseline.cpp, avx2.cpp and avx512.cpp defines these and includes this file once.

#if !defined(__GNUC__) && !defined(__clang__)
#error "The loops need the vector types of GCC and Clang. Without them the loops of PyTorch's ops run."
#endif

// setup.py turns these modes off. GCC says of all of them, and Clang of some, that they are on.
#if defined(__FAST_MATH__) || __FINITE_MATH_ONLY__ || (defined(__GCC_IEC_559) && !__GCC_IEC_559)
#error "Under -ffast-math, and under any part of it, the loops would give wrong numbers."
#endif

// The shared headers come first, so that they are compiled for any CPU.
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "interface.h"
#include "threads.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))
#define NEVER_INLINE __attribute__((noinline))
#define SIMD _Pragma("omp simd")

#if defined(LEVEL_TARGET) && defined(__clang__)
#define LEVEL_PRAGMA(text) _Pragma(#text)
#define LEVEL_BEGIN(features) LEVEL_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
LEVEL_BEGIN(LEVEL_TARGET)
#elif defined(LEVEL_TARGET)
#define LEVEL_PRAGMA(text) _Pragma(#text)
#define LEVEL_BEGIN(features) LEVEL_PRAGMA(GCC target(features))
LEVEL_BEGIN(LEVEL_TARGET)
#endif

namespace masked_rnn {
namespace LEVEL {

constexpr ptrdiff_t TILE_ROWS = TILE_ROWS_OF_THIS_CPU;

#include "vec.h"
#include "layout.h"
#include "activations.h"
#include "cells.h"
#include "gemm.h"
#include "weights.h"
#include "loops.h"

}  // namespace LEVEL
}  // namespace masked_rnn

#if defined(LEVEL_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
