// Products with packed matrices: of few rows with a weight, and of columns for the weights' gradients.
#pragma once

#include <stddef.h>

#include "basics.h"
#include "layout.h"
#include "level.h"
#include "panels.h"
#include "tile.h"
#include "vec.h"

LEVEL_BEGIN
namespace masked_rnn::LEVEL {

template <class T, int M>
NEVER_INLINE void multiply_rows(const T* const* a, const T* panel, ptrdiff_t depth, Start start, const T* row,
                                T* const* c, ptrdiff_t column, ptrdiff_t count) {
    const RowsOfA<T, M> rows(a);
    const auto product = [&](TileSums<T, M>& sums) ALWAYS_INLINE_LAMBDA {
        add_product<T, M>(rows, panel, TILE_WIDTH<T>, depth, sums);
    };
    multiply_tile<T, M>(product, start, row, c, column, count);
}

// C = start + A B, for one row, and for two panels at once, so that a number of A is loaded for twice as many sums.
template <class T>
NEVER_INLINE void multiply_row(const T* a, const T* first, const T* second, ptrdiff_t depth, Start start, const T* row,
                               T* c) {
    constexpr ptrdiff_t lanes = LANES<T>, PARTS = SUMS_AT_ONCE / 4;  // of the depth, see add_product
    static_assert(PARTS == 2);
    Vec<T> sums[PARTS][4] = {};
    const auto add = [&](ptrdiff_t k, Vec<T>(&to)[4]) ALWAYS_INLINE_LAMBDA {
        const T *b = first + k * TILE_WIDTH<T>, *more_b = second + k * TILE_WIDTH<T>;
        to[0] += a[k] * load(b), to[1] += a[k] * load(b + lanes);
        to[2] += a[k] * load(more_b), to[3] += a[k] * load(more_b + lanes);
    };
    ptrdiff_t k = 0;
    for (; k + PARTS <= depth; k += PARTS) add(k, sums[0]), add(k + 1, sums[1]);
    if (k < depth) add(k, sums[0]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        Vec<T> sum = sums[0][j] + sums[1][j];
        if (start != AT_ZERO) sum += load((start == AT_ROW ? row : c) + j * lanes);
        store(c + j * lanes, sum);
    }
}

// C = start + A B, for at most MOST_ADDRESSES rows. `a` and `c` are tables of the rows' addresses.
template <class T>
NEVER_INLINE void multiply_packed(const T* const* a, const Panels<T>& b, Start start, const T* row, T* const* c,
                                  ptrdiff_t rows) {
    ptrdiff_t column = 0, p = 0;
    if (rows == 1)
        for (; column + 2 * TILE_WIDTH<T> <= b.columns; column += 2 * TILE_WIDTH<T>, p += 2)
            multiply_row(a[0], b.panel(p), b.panel(p + 1), b.depth, start, row ? row + column : nullptr, c[0] + column);
    unsigned char tiles[MOST_ADDRESSES];
    for (ptrdiff_t i = 0, n = 0; i < rows; i += tiles[n++])
        tiles[n] = static_cast<unsigned char>(next_rows(rows - i, TILE_ROWS));
    for (; column < b.columns; column += TILE_WIDTH<T>, ++p) {
        const T* panel = b.panel(p);
        const ptrdiff_t count = b.columns - column;
        for (ptrdiff_t i = 0, n = 0; i < rows; i += tiles[n++]) {
            with_constant<TILE_ROWS>(tiles[n], [&](auto M) ALWAYS_INLINE_LAMBDA {
                multiply_rows<T, M>(a + i, panel, b.depth, start, row, c + i, column, count);
            });
        }
    }
}

template <class T, int M>
NEVER_INLINE void multiply_columns_tile(const T* packed, const T* panel, ptrdiff_t depth, Start start, T* const* c,
                                        ptrdiff_t column, ptrdiff_t count) {
    const auto product = [&](TileSums<T, M>& sums) ALWAYS_INLINE_LAMBDA {
        add_product<T, M>(PackedColumnsOfA<T, M>{packed}, panel, TILE_WIDTH<T>, depth, sums);
    };
    multiply_tile<T, M>(product, start, static_cast<const T*>(nullptr), c, column, count);
}

// C = start + Aᵀ B, for packed columns of A. `c` is a table of the rows of C.
template <class T>
NEVER_INLINE void multiply_columns(const T* packed, ptrdiff_t rows, const Panels<T>& b, Start start, T* const* c) {
    const auto multiply = [&](ptrdiff_t i, ptrdiff_t column) ALWAYS_INLINE_LAMBDA {
        with_constant<TILE_ROWS>(min(TILE_ROWS, rows - i), [&](auto M) ALWAYS_INLINE_LAMBDA {
            multiply_columns_tile<T, M>(packed + i * b.depth, b.panel(column / TILE_WIDTH<T>), b.depth, start, c + i,
                                        column, b.columns - column);
        });
    };
    // Rows of C are written one after the other if B stays in a second-level cache of 256 KiB meanwhile. Large rows are
    // often a multiple of 4 KiB apart: then writing some numbers of each in turns takes twice as long.
    if (b.size(b.depth, b.columns) * sizeof(T) <= (256 << 10)) {
        for (ptrdiff_t i = 0; i < rows; i += TILE_ROWS)
            for (ptrdiff_t column = 0; column < b.columns; column += TILE_WIDTH<T>) multiply(i, column);
    } else {
        for (ptrdiff_t column = 0; column < b.columns; column += TILE_WIDTH<T>)
            for (ptrdiff_t i = 0; i < rows; i += TILE_ROWS) multiply(i, column);
    }
}

}  // namespace masked_rnn::LEVEL
LEVEL_END
