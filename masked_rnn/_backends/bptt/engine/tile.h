// The tile that all products are made of: some rows of C, two registers wide, whose sums stay in registers.
#pragma once

#include <stddef.h>

#include <utility>

#include "basics.h"
#include "level.h"
#include "vec.h"

LEVEL_BEGIN
namespace masked_rnn::LEVEL {

template <class T>
constexpr ptrdiff_t TILE_WIDTH = 2 * LANES<T>;

// Sums to add to at the same time: a product and its addition take 4 cycles or so, and two of them start in a cycle.
constexpr int SUMS_AT_ONCE = 8;

// Calls a function with a number from 1 to MOST as a constant.
template <class Function, size_t... K>
ALWAYS_INLINE void call_with(ptrdiff_t number, const Function& function, std::index_sequence<K...>) {
    (void)((number == ptrdiff_t(K) + 1 && (function(std::integral_constant<int, K + 1>()), true)) || ...);
}
template <int MOST, class Function>
ALWAYS_INLINE void with_constant(ptrdiff_t number, const Function& function) {
    call_with(number, function, std::make_index_sequence<MOST>());
}

// The number of rows for the next tile. Avoids a last tile of only one or two rows.
ALWAYS_INLINE ptrdiff_t next_rows(ptrdiff_t left, ptrdiff_t most) { return divide_up(left, divide_up(left, most)); }

// The numbers of A that a tile multiplies, if A is rows given by their addresses.
template <class T, int M>
struct RowsOfA {
    const T* row[M];

    ALWAYS_INLINE explicit RowsOfA(const T* const* rows) {
        for (int r = 0; r < M; ++r) row[r] = rows[r];
    }
    ALWAYS_INLINE T at(int r, ptrdiff_t k) const { return row[r][k]; }
};

// The numbers of A that a tile multiplies, if A is packed columns.
template <class T, int M>
struct PackedColumnsOfA {
    const T* begin;
    ALWAYS_INLINE T at(int r, ptrdiff_t k) const { return begin[k * TILE_ROWS + r]; }
};

// The sums of a tile of M rows.
template <class T, int M>
using TileSums = Vec<T>[M][2];

// sums += A B, for M rows and TILE_WIDTH columns of B: (depth, stride).
template <class T, int M, class A>
ALWAYS_INLINE void add_product(const A& a, const T* b, ptrdiff_t stride, ptrdiff_t depth, TileSums<T, M>& sums) {
    constexpr int PARTS = divide_up(SUMS_AT_ONCE, 2 * M);  // of the depth. With few rows, each part has sums of its own
    ptrdiff_t k = 0;
    if constexpr (PARTS > 1) {
        TileSums<T, M> part[PARTS] = {};
        for (; k + PARTS <= depth; k += PARTS) {
#pragma GCC unroll 4
            for (int s = 0; s < PARTS; ++s) {
                const Vec<T> b0 = load(b + (k + s) * stride), b1 = load(b + (k + s) * stride + LANES<T>);
#pragma GCC unroll 16
                for (int r = 0; r < M; ++r) {
                    part[s][r][0] += a.at(r, k + s) * b0;
                    part[s][r][1] += a.at(r, k + s) * b1;
                }
            }
        }
#pragma GCC unroll 4
        for (int s = 1; s < PARTS; ++s)
#pragma GCC unroll 16
            for (int r = 0; r < M; ++r) {
                part[0][r][0] += part[s][r][0];
                part[0][r][1] += part[s][r][1];
            }
#pragma GCC unroll 16
        for (int r = 0; r < M; ++r) {
            sums[r][0] += part[0][r][0];
            sums[r][1] += part[0][r][1];
        }
    }
    for (; k < depth; ++k) {
        const Vec<T> b0 = load(b + k * stride), b1 = load(b + k * stride + LANES<T>);
#pragma GCC unroll 16
        for (int r = 0; r < M; ++r) {
            sums[r][0] += a.at(r, k) * b0;
            sums[r][1] += a.at(r, k) * b1;
        }
    }
}

// Loads and stores the first numbers of two registers, for a row that ends there.
template <class T>
inline void load_part(const T* from, ptrdiff_t count, Vec<T> (&sums)[2]) {
    T all[TILE_WIDTH<T>] = {};
    for (ptrdiff_t j = 0; j < count; ++j) all[j] = from[j];
    sums[0] = load(all), sums[1] = load(all + LANES<T>);
}

template <class T>
inline void store_part(T* to, ptrdiff_t count, const Vec<T> (&sums)[2]) {
    T all[TILE_WIDTH<T>];
    store(all, sums[0]), store(all + LANES<T>, sums[1]);
    for (ptrdiff_t j = 0; j < count; ++j) to[j] = all[j];
}

// The value that the sums start from.
enum Start { AT_ZERO, AT_C, AT_ROW };

// C = start + A B, for M rows of C and `count` columns of them. `add_product` adds A B to the sums.
template <class T, int M, class AddProduct>
ALWAYS_INLINE void multiply_tile(const AddProduct& add_product, Start start, const T* row, T* const* c,
                                 ptrdiff_t column, ptrdiff_t count) {
    TileSums<T, M> sums = {};
    const bool whole = count >= TILE_WIDTH<T>;
    if (start == AT_C) {  // C may not be in the cache: prefetch it during the product, and add it last
#pragma GCC unroll 16
        for (int r = 0; r < M; ++r)
            __builtin_prefetch(c[r] + column, 1), __builtin_prefetch(c[r] + column + LANES<T>, 1);
    }
    if (start == AT_ROW) {
#pragma GCC unroll 16
        for (int r = 0; r < M; ++r) {
            if (whole)
                sums[r][0] = load(row + column), sums[r][1] = load(row + column + LANES<T>);
            else
                load_part(row + column, count, sums[r]);
        }
    }
    add_product(sums);
    if (start == AT_C) {
#pragma GCC unroll 16
        for (int r = 0; r < M; ++r) {
            Vec<T> more[2];
            if (whole)
                more[0] = load(c[r] + column), more[1] = load(c[r] + column + LANES<T>);
            else
                load_part(c[r] + column, count, more);
            sums[r][0] += more[0], sums[r][1] += more[1];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) {
        T* to = c[r] + column;
        if (whole)
            store(to, sums[r][0]), store(to + LANES<T>, sums[r][1]);
        else
            store_part(to, count, sums[r]);
    }
}

}  // namespace masked_rnn::LEVEL
LEVEL_END
