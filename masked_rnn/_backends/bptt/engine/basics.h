// Small functions of numbers and arrays.
#pragma once

#include <stddef.h>

#include "level.h"

LEVEL_BEGIN
namespace masked_rnn::LEVEL {

// <algorithm> is not used: of a standard template the linker may keep a copy that was compiled for another CPU.
ALWAYS_INLINE constexpr ptrdiff_t min(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
ALWAYS_INLINE constexpr ptrdiff_t max(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
ALWAYS_INLINE constexpr ptrdiff_t divide_up(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }

template <class T>
NEVER_INLINE void copy(ptrdiff_t count, const T* from, T* to) {
    SIMD
    for (ptrdiff_t j = 0; j < count; ++j) to[j] = from[j];
}

template <class T>
NEVER_INLINE void add(ptrdiff_t count, const T* from, T* to) {
    SIMD
    for (ptrdiff_t j = 0; j < count; ++j) to[j] += from[j];
}

template <class T>
NEVER_INLINE void fill(ptrdiff_t count, T* to) {
    SIMD
    for (ptrdiff_t j = 0; j < count; ++j) to[j] = 0;
}

}  // namespace masked_rnn::LEVEL
LEVEL_END
