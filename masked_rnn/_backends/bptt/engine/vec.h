// A register of numbers as one value, in GCC's vector types.
//
// It is not a SIMD library's: that would replace these functions alone. The one that was looked at, Highway, has a tanh
// with an error of 4 units in the last place; ours (sigmoid_tanh.h) has 2.
#pragma once

#include <stddef.h>

#include <utility>

#include "level.h"

LEVEL_BEGIN
namespace masked_rnn::LEVEL {

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
    typedef float type __attribute__((vector_size(REGISTER_BYTES)));
    typedef float unaligned __attribute__((vector_size(REGISTER_BYTES), aligned(4), may_alias));
};
template <>
struct VecOf<double> {
    typedef double type __attribute__((vector_size(REGISTER_BYTES)));
    typedef double unaligned __attribute__((vector_size(REGISTER_BYTES), aligned(8), may_alias));
};

template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
constexpr ptrdiff_t LANES = REGISTER_BYTES / sizeof(T);

template <class T>
ALWAYS_INLINE Vec<T> load(const T* from) {
    return *reinterpret_cast<const typename VecOf<T>::unaligned*>(from);
}

template <class T>
ALWAYS_INLINE void store(T* to, Vec<T> value) {
    *reinterpret_cast<typename VecOf<T>::unaligned*>(to) = value;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLES 1
#endif
#endif

#if HAS_SHUFFLES
// Interleaves the numbers from `begin` on of two registers.
template <class T, ptrdiff_t BEGIN, size_t... K>
ALWAYS_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<K...>) {
    return __builtin_shufflevector(a, b, (BEGIN + K / 2 + K % 2 * LANES<T>)...);
}
#endif

// Transposes the numbers in some registers.
template <class T>
ALWAYS_INLINE void transpose(Vec<T> (&rows)[LANES<T>]) {
    constexpr ptrdiff_t L = LANES<T>;
#if HAS_SHUFFLES
    // Each round interleaves the first half of the rows with the second.
    Vec<T> next[L];
#pragma GCC unroll 4
    for (ptrdiff_t round = 1; round < L; round *= 2) {
#pragma GCC unroll 16
        for (ptrdiff_t r = 0; r < L / 2; ++r) {
            next[2 * r] = interleave<T, 0>(rows[r], rows[r + L / 2], std::make_index_sequence<L>());
            next[2 * r + 1] = interleave<T, L / 2>(rows[r], rows[r + L / 2], std::make_index_sequence<L>());
        }
#pragma GCC unroll 16
        for (ptrdiff_t r = 0; r < L; ++r) rows[r] = next[r];
    }
#else
    for (ptrdiff_t r = 0; r < L; ++r)
        for (ptrdiff_t k = r + 1; k < L; ++k) {
            const T number = rows[r][k];
            rows[r][k] = rows[k][r];
            rows[k][r] = number;
        }
#endif
}

#if HAS_SHUFFLES
// Blocks of S numbers: the first (HALF 0) or second (HALF 1) of each pair of blocks, in turns from two registers.
template <class T, ptrdiff_t S, ptrdiff_t HALF, size_t... K>
ALWAYS_INLINE Vec<T> take_blocks(Vec<T> a, Vec<T> b, std::index_sequence<K...>) {
    return __builtin_shufflevector(a, b,
                                   (K / (2 * S) * (2 * S) + HALF * S + K % S + (K % (2 * S) < S ? 0 : LANES<T>))...);
}

// Halves the number of registers, and of numbers that belong to one sum.
template <class T, ptrdiff_t S>
ALWAYS_INLINE void add_blocks(Vec<T> (&rows)[LANES<T>]) {
    constexpr auto lanes = std::make_index_sequence<LANES<T>>();
#pragma GCC unroll 16
    for (ptrdiff_t r = 0; r < S; ++r)
        rows[r] = take_blocks<T, S, 0>(rows[r], rows[r + S], lanes) + take_blocks<T, S, 1>(rows[r], rows[r + S], lanes);
    if constexpr (S > 1) add_blocks<T, S / 2>(rows);
}
#endif

// Sums the numbers in each register: one number of the result for each.
template <class T>
ALWAYS_INLINE Vec<T> sum_registers(Vec<T> (&rows)[LANES<T>]) {
#if HAS_SHUFFLES
    add_blocks<T, LANES<T> / 2>(rows);
    return rows[0];
#else
    Vec<T> sums = {};
    for (ptrdiff_t r = 0; r < LANES<T>; ++r)
        for (ptrdiff_t k = 0; k < LANES<T>; ++k) sums[r] += rows[r][k];
    return sums;
#endif
}

template <class T>
using Mask = decltype(Vec<T>{} < Vec<T>{});

// A mask of a register's first lanes.
template <class T>
ALWAYS_INLINE Mask<T> first_lanes(ptrdiff_t count) {
    Vec<T> places;
#pragma GCC unroll 16
    for (ptrdiff_t j = 0; j < LANES<T>; ++j) places[j] = T(j);
    return places < T(count);
}

// The first numbers of a register, then zeros.
template <class T>
inline Vec<T> load_first(const T* from, ptrdiff_t count) {
    T all[LANES<T>] = {};
    for (ptrdiff_t j = 0; j < count; ++j) all[j] = from[j];
    return load(all);
}

}  // namespace masked_rnn::LEVEL
LEVEL_END
