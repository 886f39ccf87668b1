// Matrix products of few rows with packed weights, and products of columns for the weights' gradients. Both use one
// tile that keeps its sums in registers: up to TILE_ROWS rows of two registers each.

template <class T>
constexpr ptrdiff_t TILE_WIDTH = 2 * LANES<T>;

// The numbers of A that a tile multiplies: rows given by their addresses,
template <class T, int M>
struct RowsOfA {
    const T* row[M];
    ALWAYS_INLINE T at(int r, ptrdiff_t k) const { return row[r][k]; }
};

// or packed columns, side by side.
template <class T, int M>
struct PackedColumnsOfA {
    const T* begin;
    ALWAYS_INLINE T at(int r, ptrdiff_t k) const { return begin[k * TILE_ROWS + r]; }
};

// sums += A B, for M rows and TILE_WIDTH columns of B: (depth, stride).
template <class T, int M, class A>
ALWAYS_INLINE void add_product(const A& a, const T* b, ptrdiff_t stride, ptrdiff_t depth, Vec<T> (&sums)[M][2]) {
    // With few rows, each sum would wait for the one before. So each row has several sums, over parts of the depth.
    constexpr int APART = M >= 4 ? 1 : M == 1 ? 4 : 2;
    ptrdiff_t k = 0;
    if constexpr (APART > 1) {
        Vec<T> part[APART][M][2] = {};
        for (; k + APART <= depth; k += APART) {
#pragma GCC unroll 4
            for (int s = 0; s < APART; ++s) {
                const Vec<T> b0 = load(b + (k + s) * stride), b1 = load(b + (k + s) * stride + LANES<T>);
#pragma GCC unroll 16
                for (int r = 0; r < M; ++r) {
                    part[s][r][0] += a.at(r, k + s) * b0;
                    part[s][r][1] += a.at(r, k + s) * b1;
                }
            }
        }
#pragma GCC unroll 4
        for (int s = 1; s < APART; ++s)
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
    Vec<T> sums[M][2] = {};
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

// The number of rows for the next tile. Avoids a last tile of only one or two rows.
ALWAYS_INLINE ptrdiff_t rows_of_next_tile(ptrdiff_t left) { return divide_up(left, divide_up(left, TILE_ROWS)); }

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

template <class T, int M>
NEVER_INLINE void multiply_rows(const T* const* a, const T* panel, ptrdiff_t depth, Start start, const T* row,
                                T* const* c, ptrdiff_t column, ptrdiff_t count) {
    RowsOfA<T, M> rows;
    for (int r = 0; r < M; ++r) rows.row[r] = a[r];
    const auto product = [&](Vec<T>(&sums)[M][2]) ALWAYS_INLINE_LAMBDA {
        add_product<T, M>(rows, panel, TILE_WIDTH<T>, depth, sums);
    };
    multiply_tile<T, M>(product, start, row, c, column, count);
}

// C = start + A B, for one row, and for two panels at once, so that a number of A is loaded for twice as many sums.
template <class T>
NEVER_INLINE void multiply_row(const T* a, const T* first, const T* second, ptrdiff_t depth, Start start, const T* row,
                               T* c) {
    constexpr ptrdiff_t L = LANES<T>, APART = 2;  // see add_product
    Vec<T> sums[APART][4] = {};
    const auto add = [&](ptrdiff_t k, Vec<T>(&to)[4]) ALWAYS_INLINE_LAMBDA {
        const T *b = first + k * TILE_WIDTH<T>, *more_b = second + k * TILE_WIDTH<T>;
        to[0] += a[k] * load(b), to[1] += a[k] * load(b + L);
        to[2] += a[k] * load(more_b), to[3] += a[k] * load(more_b + L);
    };
    ptrdiff_t k = 0;
    for (; k + APART <= depth; k += APART) add(k, sums[0]), add(k + 1, sums[1]);
    if (k < depth) add(k, sums[0]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        Vec<T> sum = sums[0][j] + sums[1][j];
        if (start != AT_ZERO) sum += load((start == AT_ROW ? row : c) + j * L);
        store(c + j * L, sum);
    }
}

// C = start + A B, for at most TABLE rows. `a` and `c` are tables of the rows' addresses.
template <class T>
NEVER_INLINE void multiply_packed(const T* const* a, const Panels<T>& b, Start start, const T* row, T* const* c,
                                  ptrdiff_t rows) {
    ptrdiff_t column = 0, p = 0;
    if (rows == 1)
        for (; column + 2 * TILE_WIDTH<T> <= b.columns; column += 2 * TILE_WIDTH<T>, p += 2)
            multiply_row(a[0], b.panel(p), b.panel(p + 1), b.depth, start, row ? row + column : nullptr, c[0] + column);
    unsigned char tiles[TABLE];
    for (ptrdiff_t i = 0, n = 0; i < rows; i += tiles[n++])
        tiles[n] = static_cast<unsigned char>(rows_of_next_tile(rows - i));
    for (; column < b.columns; column += TILE_WIDTH<T>, ++p) {
        const T* panel = b.panel(p);
        const ptrdiff_t count = b.columns - column;
        for (ptrdiff_t i = 0, n = 0; i < rows; i += tiles[n++]) {
            switch (tiles[n]) {
#define CASE(M) \
    case M: multiply_rows<T, M>(a + i, panel, b.depth, start, row, c + i, column, count); break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if TILE_ROWS_OF_THIS_CPU > 6
                CASE(7) CASE(8)
#endif
#undef CASE
            }
        }
    }
}

// Packs the transpose of a weight (M, K) into panels. Row `first` becomes column 0; the rows before it come last.
template <class T>
NEVER_INLINE void pack_transposed(const T* weight, ptrdiff_t M, ptrdiff_t K, ptrdiff_t first, const Panels<T>& to,
                                  ptrdiff_t p) {
    const ptrdiff_t here = min(TILE_WIDTH<T>, M - p * TILE_WIDTH<T>);
    T* panel = to.panel(p);
    const T* row[TILE_WIDTH<T>];
    for (ptrdiff_t j = 0; j < TILE_WIDTH<T>; ++j)
        row[j] = weight + (p * TILE_WIDTH<T> + min(j, here - 1) + first) % M * K;
    constexpr ptrdiff_t L = LANES<T>;
    ptrdiff_t k = 0;
    for (; k + L <= K; k += L) {
        for (ptrdiff_t half = 0; half < TILE_WIDTH<T>; half += L) {
            Vec<T> square[L];
#pragma GCC unroll 16
            for (ptrdiff_t j = 0; j < L; ++j) square[j] = load(row[half + j] + k);
            transpose<T>(square);
#pragma GCC unroll 16
            for (ptrdiff_t j = 0; j < L; ++j) store(panel + (k + j) * TILE_WIDTH<T> + half, square[j]);
        }
    }
    for (; k < K; ++k)
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

// Packs a weight (M, K) into panels.
template <class T>
NEVER_INLINE void pack_straight(const T* weight, ptrdiff_t M, ptrdiff_t K, ptrdiff_t first, const Panels<T>& to,
                                ptrdiff_t p) {
    const ptrdiff_t column = p * TILE_WIDTH<T>, here = min(TILE_WIDTH<T>, K - column);
    T* panel = to.panel(p);
    for (ptrdiff_t k = 0; k < M; ++k) {
        const T* row = weight + (k + first) % M * K + column;
        T* out = panel + k * TILE_WIDTH<T>;
        pack_row(row, here, out);
    }
}

// Packs rows, given by their addresses, into panels.
template <class T>
NEVER_INLINE void pack_rows(const T* const* rows, const Panels<T>& to) {
    for (ptrdiff_t column = 0, p = 0; column < to.columns; column += TILE_WIDTH<T>, ++p) {
        const ptrdiff_t here = min(TILE_WIDTH<T>, to.columns - column);
        T* panel = to.panel(p);
        for (ptrdiff_t k = 0; k < to.depth; ++k) {
            const T* row = rows[k] + column;
            T* out = panel + k * TILE_WIDTH<T>;
            pack_row(row, here, out);
        }
    }
}

// Columns of a row-major matrix, packed TILE_ROWS at a time: (tiles, depth, TILE_ROWS).
template <class T>
NEVER_INLINE void pack_columns(const T* from, ptrdiff_t row, ptrdiff_t depth, ptrdiff_t columns, T* to) {
    for (ptrdiff_t k = 0; k < depth; ++k) {
        const T* source = from + k * row;
        T* out = to + k * TILE_ROWS;
        ptrdiff_t i = 0;
        for (; i + TILE_ROWS <= columns; i += TILE_ROWS, out += depth * TILE_ROWS)
            __builtin_memcpy(out, source + i, TILE_ROWS * sizeof(T));
        for (ptrdiff_t r = 0; i + r < columns; ++r) out[r] = source[i + r];
    }
}

template <class T, int M>
NEVER_INLINE void multiply_columns_tile(const T* packed, const T* panel, ptrdiff_t depth, T* const* c, ptrdiff_t column,
                                        ptrdiff_t count) {
    const auto product = [&](Vec<T>(&sums)[M][2]) ALWAYS_INLINE_LAMBDA {
        add_product<T, M>(PackedColumnsOfA<T, M>{packed}, panel, TILE_WIDTH<T>, depth, sums);
    };
    multiply_tile<T, M>(product, AT_C, static_cast<const T*>(nullptr), c, column, count);
}

// C += Aᵀ B for packed columns of A. `c` is a table of the rows of C.
template <class T>
NEVER_INLINE void multiply_columns(const T* packed, ptrdiff_t rows, const Panels<T>& b, T* const* c) {
    for (ptrdiff_t column = 0, p = 0; column < b.columns; column += TILE_WIDTH<T>, ++p) {
        const T* panel = b.panel(p);
        const ptrdiff_t count = b.columns - column;
        const T* a = packed;
        for (ptrdiff_t i = 0; i < rows; i += TILE_ROWS, a += b.depth * TILE_ROWS) {
            switch (min(TILE_ROWS, rows - i)) {
#define CASE(M) \
    case M: multiply_columns_tile<T, M>(a, panel, b.depth, c + i, column, count); break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if TILE_ROWS_OF_THIS_CPU > 6
                CASE(7) CASE(8)
#endif
#undef CASE
            }
        }
    }
}
