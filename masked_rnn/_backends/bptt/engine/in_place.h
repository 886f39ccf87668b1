// Products of few rows with weights where they lie: to pack a weight would take longer than the products.
#pragma once

#include <stddef.h>

#include "basics.h"
#include "level.h"
#include "tile.h"
#include "vec.h"

LEVEL_BEGIN
namespace masked_rnn::LEVEL {

// Registers of sums. `sum_registers` takes as many as a register has numbers.
template <class T>
constexpr ptrdiff_t SUMS = max(SUMS_AT_ONCE, LANES<T>);

constexpr ptrdiff_t ROWS_IN_PLACE = 4;  // the most rows of A at once: as many numbers of A stay in registers

// Rows `first` to `stop` of a weight (rows, columns).
template <class T>
struct SomeRows {
    const T* weight;
    ptrdiff_t rows, columns, first, stop;

    const T* row(ptrdiff_t k) const { return weight + k * columns; }
    const T* end() const { return row(rows); }
};

// C = start + A Bᵀ, for M rows of A and of C, whose numbers begin at `column`. B's weight has at least SUMS rows.
template <class T, int M>
NEVER_INLINE void multiply_by_rows(const T* const* a, const SomeRows<T>& b, Start start, const T* row, T* const* c,
                                   ptrdiff_t column) {
    constexpr ptrdiff_t lanes = LANES<T>, AT_ONCE = SUMS<T> / (M == 3 ? 4 : M);  // AT_ONCE divides SUMS
    const ptrdiff_t depth = b.columns, whole = depth / lanes * lanes;
    const T *of_a[M], *end = b.end();
    Vec<T> ends[M];  // the numbers after the last whole register
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) {
        of_a[r] = a[r];
        ends[r] = load_first(a[r] + whole, depth - whole);
    }
    for (ptrdiff_t j = b.first; j < b.stop; j += AT_ONCE, column += AT_ONCE) {
        const ptrdiff_t begin =
            min(j, b.rows - AT_ONCE);  // AT_ONCE rows are multiplied, of which the last ones may be wanted
        const T* of_b = b.row(begin);
        Vec<T> sums[SUMS<T>] = {};
        for (ptrdiff_t k = 0; k < whole; k += lanes) {
            Vec<T> numbers[M];
#pragma GCC unroll 4
            for (int r = 0; r < M; ++r) numbers[r] = load(of_a[r] + k);
#pragma GCC unroll 16
            for (ptrdiff_t g = 0; g < AT_ONCE; ++g) {
                const Vec<T> weights = load(of_b + g * depth + k);
#pragma GCC unroll 4
                for (int r = 0; r < M; ++r) sums[r * AT_ONCE + g] += numbers[r] * weights;
            }
        }
        if (const ptrdiff_t left = depth - whole) {
            // Reads whole registers where the matrix goes on after its row.
            const bool goes_on = end - (of_b + (AT_ONCE - 1) * depth + whole) >= lanes;
            const Mask<T> first = first_lanes<T>(left);
#pragma GCC unroll 16
            for (ptrdiff_t g = 0; g < AT_ONCE; ++g) {
                const T* from = of_b + g * depth + whole;
                const Vec<T> weights = goes_on ? load(from) : load_first(from, left);
#pragma GCC unroll 4
                for (int r = 0; r < M; ++r) sums[r * AT_ONCE + g] += ends[r] * (first ? weights : Vec<T>{});
            }
        }
        T all[SUMS<T>];
#pragma GCC unroll 4
        for (ptrdiff_t s = 0; s < SUMS<T>; s += lanes) {
            Vec<T> some[lanes];
#pragma GCC unroll 16
            for (ptrdiff_t i = 0; i < lanes; ++i) some[i] = sums[s + i];
            store(all + s, sum_registers<T>(some));
        }
        const auto finish = [&](ptrdiff_t skip, ptrdiff_t count) ALWAYS_INLINE_LAMBDA {
#pragma GCC unroll 4
            for (int r = 0; r < M; ++r) {
                T* to = c[r] + column;
                const T *from = all + r * AT_ONCE + skip, *more = start == AT_ROW ? row + column : to;
                if (start == AT_ZERO)
                    for (ptrdiff_t g = 0; g < count; ++g) to[g] = from[g];
                else
                    for (ptrdiff_t g = 0; g < count; ++g) to[g] = more[g] + from[g];
            }
        };
        if (begin == j && b.stop - j >= AT_ONCE)
            finish(0, AT_ONCE);
        else
            finish(j - begin, min(b.stop - j, AT_ONCE));
    }
}

// The same for all rows of A.
template <class T>
void multiply_transposed(const T* const* a, const SomeRows<T>& b, Start start, const T* row, T* const* c,
                         ptrdiff_t column, ptrdiff_t rows) {
    // With many rows of A, the rows of B are taken in parts that stay in half of a first-level cache of 32 KiB.
    constexpr ptrdiff_t NUMBERS = (16 << 10) / sizeof(T);
    const ptrdiff_t at_once =
        rows > ROWS_IN_PLACE ? max(1, NUMBERS / max(1, b.columns * SUMS<T>)) * SUMS<T> : b.stop - b.first;
    for (ptrdiff_t j = b.first; j < b.stop; j += at_once, column += at_once) {
        const SomeRows<T> part{b.weight, b.rows, b.columns, j, min(b.stop, j + at_once)};
        for (ptrdiff_t i = 0, m; i < rows; i += m) {
            m = next_rows(rows - i, ROWS_IN_PLACE);
            with_constant<ROWS_IN_PLACE>(m, [&](auto M) ALWAYS_INLINE_LAMBDA {
                multiply_by_rows<T, M>(a + i, part, start, row, c + i, column);
            });
        }
    }
}

// C = start + A B, for M rows of A and of C, and for `count` columns of B: (depth, stride), in memory up to `end`.
template <class T, int M>
NEVER_INLINE void multiply_by_columns(const T* const* a, const T* b, const T* end, ptrdiff_t stride, ptrdiff_t depth,
                                      Start start, T* const* c, ptrdiff_t column, ptrdiff_t count) {
    const RowsOfA<T, M> rows(a);
    // The last rows of B may be too near to its end for whole registers.
    ptrdiff_t safe = depth;
    while (safe && end - (b + (safe - 1) * stride) < TILE_WIDTH<T>) --safe;
    const auto product = [&](TileSums<T, M>& sums) ALWAYS_INLINE_LAMBDA {
        add_product<T, M>(rows, b, stride, safe, sums);
        for (ptrdiff_t k = safe; k < depth; ++k) {
            Vec<T> weights[2];
            load_part(b + k * stride, count, weights);
#pragma GCC unroll 4
            for (int r = 0; r < M; ++r)
                sums[r][0] += rows.at(r, k) * weights[0], sums[r][1] += rows.at(r, k) * weights[1];
        }
    };
    multiply_tile<T, M>(product, start, static_cast<const T*>(nullptr), c, column, count);
}

// C = start + A B, for the numbers of A from `place` on.
template <class T>
NEVER_INLINE void multiply_straight(const T* const* a, ptrdiff_t place, const SomeRows<T>& b, Start start, T* const* c,
                                    ptrdiff_t rows) {
    constexpr ptrdiff_t DEPTH_AT_ONCE = 64;  // so that the rows of a large B are read side by side
    for (ptrdiff_t k = b.first; k < b.stop; k += DEPTH_AT_ONCE, place += DEPTH_AT_ONCE) {
        const ptrdiff_t depth = min(DEPTH_AT_ONCE, b.stop - k);
        const Start from = k > b.first ? AT_C : start;
        for (ptrdiff_t i = 0, m; i < rows; i += m) {
            m = next_rows(rows - i, ROWS_IN_PLACE);
            const T* of_a[ROWS_IN_PLACE];
            for (ptrdiff_t r = 0; r < m; ++r) of_a[r] = a[i + r] + place;
            for (ptrdiff_t j = 0; j < b.columns; j += TILE_WIDTH<T>) {
                with_constant<ROWS_IN_PLACE>(m, [&](auto M) ALWAYS_INLINE_LAMBDA {
                    multiply_by_columns<T, M>(of_a, b.row(k) + j, b.end(), b.columns, depth, from, c + i, j,
                                              b.columns - j);
                });
            }
        }
    }
}

}  // namespace masked_rnn::LEVEL
LEVEL_END
