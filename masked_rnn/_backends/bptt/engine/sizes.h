// The sizes that a record implies: of arrays, of each layer's weights, and of what is saved.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cell_table.h"
#include "interface.h"
#include "layer.h"

namespace masked_rnn {

// The product of sizes; the largest number if it overflows, which no array has.
inline int64_t product(int64_t a, int64_t b) {
    int64_t result;
    return __builtin_mul_overflow(a, b, &result) ? INT64_MAX : result;
}
template <class... More>
int64_t product(int64_t a, int64_t b, More... more) {
    return product(product(a, b), more...);
}
inline int64_t sum(int64_t a, int64_t b) {
    int64_t result;
    return __builtin_add_overflow(a, b, &result) ? INT64_MAX : result;
}

inline bool holds(const Array& array, int64_t size) { return array.data && size >= 0 && array.size >= size; }
// The same for an array that may be missing.
inline bool fits(const Array& array, int64_t size) { return !array.data || holds(array, size); }

// The weights of one layer and direction, in a table of all.
inline int64_t count_weights(const Run& run) { return 2 + (run.has_biases ? 2 : 0) + (run.projects ? 1 : 0); }
inline Weights weights_of(const Run& run, const Array& table, int64_t layer, int64_t direction) {
    const Array* w = data_of<const Array>(table) + (layer * run.directions + direction) * count_weights(run);
    Weights weights{w[0], w[1], {}, {}, {}};
    if (run.has_biases) weights.b_ih = w[2], weights.b_hh = w[3];
    if (run.projects) weights.w_hr = w[count_weights(run) - 1];
    return weights;
}

// The places of a layer's saved tensors in `Run::saved`, in numbers: the histories, the activations, and for two
// directions the output, which the next layer reads. With one direction that is h's history without its first rows.
struct Saved {
    int64_t h_history, c_history, activations, output, end;

    Saved(const Run& run, const CellTable& cell, int64_t layer) {
        const int64_t D = run.directions, states = product(D, sum(run.sequences, run.rows));
        h_history = 0;
        c_history = sum(h_history, product(states, run.fed_back));
        activations = sum(c_history, cell.has_c ? product(states, run.hidden) : 0);
        output = sum(activations, cell.saves_activations ? product(D, run.rows, cell.block_count, run.hidden) : 0);
        end = sum(output, D == 2 && layer + 1 < run.layers ? product(D, run.rows, run.fed_back) : 0);
    }
};

}  // namespace masked_rnn
