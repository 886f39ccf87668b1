// Matrices packed for the products of gemm.h.
#pragma once

#include <stddef.h>

#include "basics.h"
#include "cell_table.h"
#include "level.h"
#include "tile.h"
#include "vec.h"

LEVEL_BEGIN
namespace masked_rnn::LEVEL {

// A packed weight: panels of TILE_WIDTH columns, each (depth, TILE_WIDTH). The columns after the last
// one are never stored: what stands there does not matter.
template <class T>
struct Panels {
    T* data;
    ptrdiff_t depth, columns;

    static ptrdiff_t size(ptrdiff_t depth, ptrdiff_t columns) {
        return divide_up(columns, TILE_WIDTH<T>) * depth * TILE_WIDTH<T>;
    }
    T* panel(ptrdiff_t p) const { return data + p * depth * TILE_WIDTH<T>; }
};

// Packs the transpose of a weight's rows into panel p.
template <class T>
NEVER_INLINE void pack_transposed(const T* weight, const RowOrder& order, const Panels<T>& to, ptrdiff_t p) {
    const ptrdiff_t depth = to.depth;
    T* panel = to.panel(p);
    const T* row[TILE_WIDTH<T>];
    for (ptrdiff_t j = 0; j < TILE_WIDTH<T>; ++j)
        row[j] = weight + order.row(min(p * TILE_WIDTH<T> + j, to.columns - 1)) * depth;
    constexpr ptrdiff_t lanes = LANES<T>;
    ptrdiff_t k = 0;
    for (; k + lanes <= depth; k += lanes) {
        for (ptrdiff_t half = 0; half < TILE_WIDTH<T>; half += lanes) {
            Vec<T> square[lanes];
#pragma GCC unroll 16
            for (ptrdiff_t j = 0; j < lanes; ++j) square[j] = load(row[half + j] + k);
            transpose<T>(square);
#pragma GCC unroll 16
            for (ptrdiff_t j = 0; j < lanes; ++j) store(panel + (k + j) * TILE_WIDTH<T> + half, square[j]);
        }
    }
    for (; k < depth; ++k)
        for (ptrdiff_t j = 0; j < TILE_WIDTH<T>; ++j) panel[k * TILE_WIDTH<T> + j] = row[j][k];
}

// Packs a row's next numbers into a row of a panel, with zeros after the row's end.
template <class T>
ALWAYS_INLINE void pack_row(const T* row, ptrdiff_t here, T* out) {
    if (here == TILE_WIDTH<T>) {
        store(out, load(row)), store(out + LANES<T>, load(row + LANES<T>));
    } else {
        for (ptrdiff_t j = 0; j < TILE_WIDTH<T>; ++j) out[j] = j < here ? row[j] : T(0);
    }
}

// Packs a weight's rows into panel p.
template <class T>
NEVER_INLINE void pack_straight(const T* weight, const RowOrder& order, const Panels<T>& to, ptrdiff_t p) {
    const ptrdiff_t column = p * TILE_WIDTH<T>, here = min(TILE_WIDTH<T>, to.columns - column);
    T* out = to.panel(p);
    for (const RowRun& run : order)
        for (ptrdiff_t row = run.first; row < run.first + run.count; ++row, out += TILE_WIDTH<T>)
            pack_row(weight + row * to.columns + column, here, out);
}

// Packs rows, given by their addresses, into panels.
template <class T>
NEVER_INLINE void pack_rows(const T* const* rows, const Panels<T>& to) {
    for (ptrdiff_t column = 0, p = 0; column < to.columns; column += TILE_WIDTH<T>, ++p) {
        const ptrdiff_t here = min(TILE_WIDTH<T>, to.columns - column);
        T* panel = to.panel(p);
        for (ptrdiff_t k = 0; k < to.depth; ++k) {
            pack_row(rows[k] + column, here, panel + k * TILE_WIDTH<T>);
        }
    }
}

// Columns of a row-major matrix, packed TILE_ROWS at a time: (tiles, depth, TILE_ROWS).
template <class T>
NEVER_INLINE void pack_columns(const T* from, ptrdiff_t stride, ptrdiff_t depth, ptrdiff_t columns, T* to) {
    for (ptrdiff_t k = 0; k < depth; ++k) {
        const T* source = from + k * stride;
        T* out = to + k * TILE_ROWS;
        ptrdiff_t i = 0;
        for (; i + TILE_ROWS <= columns; i += TILE_ROWS, out += depth * TILE_ROWS)
            __builtin_memcpy(out, source + i, TILE_ROWS * sizeof(T));
        for (ptrdiff_t r = 0; i + r < columns; ++r) out[r] = source[i + r];
    }
}

}  // namespace masked_rnn::LEVEL
LEVEL_END
