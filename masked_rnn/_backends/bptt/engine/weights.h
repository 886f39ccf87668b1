// Products of few rows with weights where they lie: to pack a weight would take longer than the products.

template <class T>
constexpr ptrdiff_t SUMS = max(8, LANES<T>);  // registers of sums: enough that none waits for another

constexpr ptrdiff_t ROWS_IN_PLACE = 4;  // of A, at once

// The number of A's rows for the next products.
ALWAYS_INLINE ptrdiff_t rows_of_next_products(ptrdiff_t left) {
    return divide_up(left, divide_up(left, ROWS_IN_PLACE));
}

// Rows `first` to `stop` of a matrix (rows, depth).
template <class T>
struct SomeRows {
    const T* matrix;
    ptrdiff_t rows, depth, first, stop;
};

// C = start + A Bᵀ, for M rows of A and of C, whose numbers begin at `column`. B's matrix has at least SUMS rows.
template <class T, int M>
NEVER_INLINE void multiply_by_rows(const T* const* a, const SomeRows<T>& b, Start start, const T* row, T* const* c,
                                   ptrdiff_t column) {
    constexpr ptrdiff_t L = LANES<T>, ROWS = M == 3 ? 4 : M, G = SUMS<T> / ROWS;
    const ptrdiff_t depth = b.depth, whole = depth / L * L;
    const T *of_a[M], *end = b.matrix + b.rows * depth;
    Vec<T> ends[M];  // the numbers after the last whole register
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) {
        of_a[r] = a[r];
        ends[r] = load_first(a[r] + whole, depth - whole);
    }
    for (ptrdiff_t j = b.first; j < b.stop; j += G, column += G) {
        const ptrdiff_t begin = min(j, b.rows - G);  // G rows are multiplied, of which the last ones may be wanted
        const T* of_b = b.matrix + begin * depth;
        Vec<T> sums[SUMS<T>] = {};
        for (ptrdiff_t k = 0; k < whole; k += L) {
            Vec<T> numbers[M];
#pragma GCC unroll 4
            for (int r = 0; r < M; ++r) numbers[r] = load(of_a[r] + k);
#pragma GCC unroll 16
            for (ptrdiff_t g = 0; g < G; ++g) {
                const Vec<T> weights = load(of_b + g * depth + k);
#pragma GCC unroll 4
                for (int r = 0; r < M; ++r) sums[r * G + g] += numbers[r] * weights;
            }
        }
        if (const ptrdiff_t left = depth - whole) {
            // Reads whole registers where the matrix goes on after its row.
            const bool goes_on = end - (of_b + (G - 1) * depth + whole) >= L;
            const Mask<T> first = first_lanes<T>(left);
#pragma GCC unroll 16
            for (ptrdiff_t g = 0; g < G; ++g) {
                const T* from = of_b + g * depth + whole;
                const Vec<T> weights = goes_on ? load(from) : load_first(from, left);
#pragma GCC unroll 4
                for (int r = 0; r < M; ++r) sums[r * G + g] += ends[r] * (first ? weights : Vec<T>{});
            }
        }
        T all[SUMS<T>];
#pragma GCC unroll 4
        for (ptrdiff_t s = 0; s < SUMS<T>; s += L) {
            Vec<T> some[L];
#pragma GCC unroll 16
            for (ptrdiff_t i = 0; i < L; ++i) some[i] = sums[s + i];
            store(all + s, sum_each<T>(some));
        }
        const auto finish = [&](ptrdiff_t skip, ptrdiff_t count) ALWAYS_INLINE_LAMBDA {
#pragma GCC unroll 4
            for (int r = 0; r < M; ++r) {
                T* to = c[r] + column;
                const T *from = all + r * G + skip, *more = start == AT_ROW ? row + column : to;
                if (start == AT_ZERO)
                    for (ptrdiff_t g = 0; g < count; ++g) to[g] = from[g];
                else
                    for (ptrdiff_t g = 0; g < count; ++g) to[g] = more[g] + from[g];
            }
        };
        if (begin == j && b.stop - j >= G)
            finish(0, G);
        else
            finish(j - begin, min(b.stop - j, G));
    }
}

template <class T>
void multiply_by_rows(const T* const* a, const SomeRows<T>& b, Start start, const T* row, T* const* c,
                      ptrdiff_t column, ptrdiff_t rows) {
    // Some rows of B at a time, which stay in the first-level cache for all rows of A.
    constexpr ptrdiff_t NUMBERS = (16 << 10) / sizeof(T);
    const ptrdiff_t at_once =
        rows > ROWS_IN_PLACE ? max(1, NUMBERS / max(1, b.depth * SUMS<T>)) * SUMS<T> : b.stop - b.first;
    for (ptrdiff_t j = b.first; j < b.stop; j += at_once, column += at_once) {
        const SomeRows<T> some{b.matrix, b.rows, b.depth, j, min(b.stop, j + at_once)};
        for (ptrdiff_t i = 0, M; i < rows; i += M) {
            switch (M = rows_of_next_products(rows - i)) {
#define CASE(M) \
    case M: multiply_by_rows<T, M>(a + i, some, start, row, c + i, column); break;
                CASE(1) CASE(2) CASE(3) CASE(4)
#undef CASE
            }
        }
    }
}

// The numbers of C for M rows of A, and for some columns of B: (depth, stride).
template <class T, int M>
NEVER_INLINE void multiply_by_columns(const T* const* a, const T* b, const T* end, ptrdiff_t stride, ptrdiff_t depth,
                                      Start start, T* const* c, ptrdiff_t column, ptrdiff_t count) {
    RowsOfA<T, M> rows;
    for (int r = 0; r < M; ++r) rows.row[r] = a[r];
    // The last rows of B may be too near to its end for whole registers.
    ptrdiff_t safe = depth;
    while (safe && end - (b + (safe - 1) * stride) < TILE_WIDTH<T>) --safe;
    const auto product = [&](Vec<T>(&sums)[M][2]) ALWAYS_INLINE_LAMBDA {
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

// C = start + A B, for rows of A from number `begin` on. B is (depth, columns), and its memory goes on up to `end`.
template <class T>
NEVER_INLINE void multiply_by_straight(const T* const* a, ptrdiff_t begin, const T* b, ptrdiff_t depth,
                                       ptrdiff_t columns, const T* end, Start start, T* const* c, ptrdiff_t rows) {
    constexpr ptrdiff_t DEPTH_AT_ONCE = 64;  // so that the rows of a large B are read side by side
    for (ptrdiff_t k = 0; k < depth; k += DEPTH_AT_ONCE) {
        const ptrdiff_t here = min(DEPTH_AT_ONCE, depth - k);
        const Start from = k ? AT_C : start;
        for (ptrdiff_t i = 0, M; i < rows; i += M) {
            M = rows_of_next_products(rows - i);
            const T* of_a[ROWS_IN_PLACE];
            for (ptrdiff_t r = 0; r < M; ++r) of_a[r] = a[i + r] + begin + k;
            for (ptrdiff_t j = 0; j < columns; j += TILE_WIDTH<T>) {
                const T* part = b + k * columns + j;
                switch (M) {
#define CASE(M) \
    case M: multiply_by_columns<T, M>(of_a, part, end, columns, here, from, c + i, j, columns - j); break;
                    CASE(1) CASE(2) CASE(3) CASE(4)
#undef CASE
                }
            }
        }
    }
}

// A weight (M, K) whose transpose is multiplied. Row `first` comes first, and those before it come last.
template <class T>
struct Transposed {
    const T* weight;
    ptrdiff_t M, K, first;
    bool is_packed;  // or it stays in place
    Panels<T> panels;

    void take(const Array& array, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t first_row, ptrdiff_t products,
              Memory& memory) {
        weight = in<const T>(array), M = rows, K = columns, first = first_row;
        is_packed = M < SUMS<T> || !stays_in_place<T>(K, products);
        panels = {memory.take<T>(is_packed ? Panels<T>::size(K, M) : 0), K, M};
    }
    void pack(ptrdiff_t p) const {
        if (is_packed && p * TILE_WIDTH<T> < M) pack_transposed(weight, M, K, first, panels, p);
    }
    // C = start + A Wᵀ, for at most TABLE rows.
    void multiply(const T* const* a, Start start, const T* row, T* const* c, ptrdiff_t rows) const {
        if (is_packed) return multiply_packed(a, panels, start, row, c, rows);
        multiply_by_rows(a, SomeRows<T>{weight, M, K, first, M}, start, row, c, 0, rows);
        multiply_by_rows(a, SomeRows<T>{weight, M, K, 0, first}, start, row, c, M - first, rows);
    }
};

// The same for products with the weight itself.
template <class T>
struct Straight {
    const T* weight;
    ptrdiff_t M, K, first;
    bool is_packed;
    Panels<T> panels;

    void take(const Array& array, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t first_row, ptrdiff_t products,
              Memory& memory) {
        weight = in<const T>(array), M = rows, K = columns, first = first_row;
        is_packed = !stays_in_place<T>(K, products);
        panels = {memory.take<T>(is_packed ? Panels<T>::size(M, K) : 0), M, K};
    }
    void pack(ptrdiff_t p) const {
        if (is_packed && p * TILE_WIDTH<T> < K) pack_straight(weight, M, K, first, panels, p);
    }
    // C = start + A W, for at most TABLE rows.
    void multiply(const T* const* a, Start start, T* const* c, ptrdiff_t rows) const {
        if (is_packed) return multiply_packed(a, panels, start, static_cast<const T*>(nullptr), c, rows);
        multiply_by_straight(a, 0, weight + first * K, M - first, K, weight + M * K, start, c, rows);
        if (first) multiply_by_straight(a, M - first, weight, first, K, weight + M * K, AT_C, c, rows);
    }
};
