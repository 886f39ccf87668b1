// One step of each cell and its derivative, for one row, in the letters of torch.nn's docs.
//
// `activations` holds blocks of H numbers, in the order of the cell's table: before a step, the sums of products and
// biases; after it, the gates, except the GRU's g and an RNN's a, which stay sums. A step may change states in place.
// `delta` gets the gradients of these sums, in the same blocks.
#pragma once

#include <stddef.h>

#include "layer.h"
#include "level.h"
#include "sigmoid_tanh.h"

LEVEL_BEGIN
namespace masked_rnn::LEVEL {

template <class T>
struct Row {
    T* activations;
    const T* h;  // before the step
    const T* c;
    T* h_after;
    T* c_after;
};

// The tensors of a step back. `dh` is first the gradient of h after the step, and then the part of the gradient of h
// before the step that does not come through the recurrent product.
template <class T>
struct RowBack {
    const T* activations;
    const T* h;
    const T* c;
    const T* h_after;
    const T* c_after;
    T* dh;
    T* dc;
    T* delta;
    T* m;  // gets the LSTM's o tanh(c), which is projected to h
};

// r, z = σ(W_i x + b_i + W_h h + b_h);  g = W_hn h + b_hn;  n = tanh(W_in x + b_in + r g);  h' = (1 - z) n + z h.
struct Gru {
    static constexpr CellTable TABLE = {
        /* block_count */ 4,
        {
            {NONE, 2},  // g
            {0, 0},     // r
            {1, 1},     // z
            {2, NONE},  // n
        },
        /* has_c */ false,
        /* saves_activations */ true,
        /* keeps_dh */ true,
    };

    template <class T>
    static void step(ptrdiff_t H, const Row<T>& row) {
        T *g = row.activations, *r = g + H, *z = r + H, *n = z + H, *h_after = row.h_after;
        const T* h = row.h;
        SIMD
        for (ptrdiff_t j = 0; j < H; ++j) {
            r[j] = sigmoid(r[j]);
            z[j] = sigmoid(z[j]);
            n[j] = tanh(n[j] + r[j] * g[j]);
            h_after[j] = n[j] + z[j] * (h[j] - n[j]);
        }
    }

    template <class T>
    static void step_back(ptrdiff_t H, const RowBack<T>& row) {
        const T *g = row.activations, *r = g + H, *z = r + H, *n = z + H, *h = row.h;
        T *dg = row.delta, *dr = dg + H, *dz = dr + H, *dn = dz + H, *dh = row.dh;
        SIMD
        for (ptrdiff_t j = 0; j < H; ++j) {
            const T d = dh[j], d_n = d * (1 - z[j]) * (1 - n[j] * n[j]);
            dg[j] = d_n * r[j];
            dr[j] = d_n * g[j] * r[j] * (1 - r[j]);
            dz[j] = d * (h[j] - n[j]) * z[j] * (1 - z[j]);
            dn[j] = d_n;
            dh[j] = d * z[j];
        }
    }
};

// i, f, g, o = σ, σ, tanh, σ (W_i x + b_i + W_h h + b_h);  c' = f c + i g;  m = o tanh(c');  h' = m, or W_hr m.
struct Lstm {
    static constexpr CellTable TABLE = {
        /* block_count */ 4,
        {
            {0, 0},  // i
            {1, 1},  // f
            {2, 2},  // g
            {3, 3},  // o
        },
        /* has_c */ true,
        /* saves_activations */ true,
        /* keeps_dh */ false,
    };

    // m goes to `h_after`.
    template <class T>
    static void step(ptrdiff_t H, const Row<T>& row) {
        T *i = row.activations, *f = i + H, *g = f + H, *o = g + H, *c_after = row.c_after, *m = row.h_after;
        const T* c = row.c;
        SIMD
        for (ptrdiff_t j = 0; j < H; ++j) {
            i[j] = sigmoid(i[j]);
            f[j] = sigmoid(f[j]);
            g[j] = tanh(g[j]);
            o[j] = sigmoid(o[j]);
            c_after[j] = f[j] * c[j] + i[j] * g[j];
            m[j] = o[j] * tanh(c_after[j]);
        }
    }

    // `dh` is the gradient of m.
    template <class T>
    static void step_back(ptrdiff_t H, const RowBack<T>& row) {
        const T *i = row.activations, *f = i + H, *g = f + H, *o = g + H, *c = row.c, *c_after = row.c_after,
                *dm = row.dh;
        T *di = row.delta, *df = di + H, *dg = df + H, *d_o = dg + H, *dc = row.dc, *m = row.m;
        SIMD
        for (ptrdiff_t j = 0; j < H; ++j) {
            const T t = tanh(c_after[j]), d = dc[j] + dm[j] * o[j] * (1 - t * t);
            di[j] = d * g[j] * i[j] * (1 - i[j]);
            df[j] = d * c[j] * f[j] * (1 - f[j]);
            dg[j] = d * i[j] * (1 - g[j] * g[j]);
            d_o[j] = dm[j] * t * o[j] * (1 - o[j]);
            dc[j] = d * f[j];
            m[j] = o[j] * t;
        }
    }
};

// The table of an RNN: one block, a = W_i x + b_i + W_h h + b_h.
struct Rnn {
    static constexpr CellTable TABLE = {
        /* block_count */ 1,
        {{0, 0}},
        /* has_c */ false,
        /* saves_activations */ false,
        /* keeps_dh */ false,
    };
};

// h' = tanh(a).
struct RnnTanh : Rnn {
    template <class T>
    static void step(ptrdiff_t H, const Row<T>& row) {
        const T* a = row.activations;
        T* h_after = row.h_after;
        SIMD
        for (ptrdiff_t j = 0; j < H; ++j) h_after[j] = tanh(a[j]);
    }

    template <class T>
    static void step_back(ptrdiff_t H, const RowBack<T>& row) {
        const T *h_after = row.h_after, *dh = row.dh;
        T* da = row.delta;
        SIMD
        for (ptrdiff_t j = 0; j < H; ++j) da[j] = dh[j] * (1 - h_after[j] * h_after[j]);
    }
};

// h' = max(0, a). NaN stays NaN, and lets its gradient through, as in ATen.
struct RnnRelu : Rnn {
    template <class T>
    static void step(ptrdiff_t H, const Row<T>& row) {
        const T* a = row.activations;
        T* h_after = row.h_after;
        SIMD
        for (ptrdiff_t j = 0; j < H; ++j) h_after[j] = a[j] <= 0 ? 0 : a[j];
    }

    template <class T>
    static void step_back(ptrdiff_t H, const RowBack<T>& row) {
        const T *h_after = row.h_after, *dh = row.dh;
        T* da = row.delta;
        SIMD
        for (ptrdiff_t j = 0; j < H; ++j) da[j] = h_after[j] <= 0 ? 0 : dh[j];
    }
};

static_assert(CELL_COUNT == 4, "Each cell needs a case in both switches.");

inline CellTable table_of(int64_t cell) {
    switch (cell) {
        case GRU: return Gru::TABLE;
        case LSTM: return Lstm::TABLE;
        default: return Rnn::TABLE;
    }
}

template <class T>
struct Steps {
    void (*step)(ptrdiff_t H, const Row<T>&);
    void (*step_back)(ptrdiff_t H, const RowBack<T>&);

    static Steps of(int64_t cell) {
        switch (cell) {
            case GRU: return {Gru::step<T>, Gru::step_back<T>};
            case LSTM: return {Lstm::step<T>, Lstm::step_back<T>};
            case RNN_TANH: return {RnnTanh::step<T>, RnnTanh::step_back<T>};
            default: return {RnnRelu::step<T>, RnnRelu::step_back<T>};
        }
    }
};

}  // namespace masked_rnn::LEVEL
LEVEL_END
