// Checks a record before anything is read: its numbers, and that each array is as large as they imply. plan.h checks
// the lengths and the tables of a plan.
#pragma once

#include <stdint.h>

#include <initializer_list>

#include "cell_table.h"
#include "interface.h"
#include "layer.h"
#include "sizes.h"

namespace masked_rnn {

inline Fault check_numbers(const Run& run) {
    constexpr int64_t MOST_THREADS = 1 << 20;  // far from an overflow where it is a factor
    if (run.cell < 0 || run.cell >= CELL_COUNT || (run.item_bytes != 4 && run.item_bytes != 8)) return "sizes";
    if ((run.directions != 1 && run.directions != 2) || run.layers < 1 || run.inputs < 0 || run.hidden < 1 ||
        run.fed_back < 1 || run.batch < 1 || run.steps < 1 || run.threads < 1 || run.threads > MOST_THREADS)
        return "sizes";
    for (const int64_t flag : {run.has_biases, run.projects, run.batch_first, run.input_is_padded, run.output_is_padded,
                               run.first_is_flat, run.last_is_flat})
        if (flag != 0 && flag != 1) return "sizes";
    if (run.projects ? run.cell != LSTM || run.fed_back > run.hidden : run.fed_back != run.hidden) return "sizes";
    return nullptr;
}

inline Fault check_weights(const Run& run, const CellTable& cell, const Array& table, Fault fault) {
    const int64_t D = run.directions, P = run.fed_back, H = run.hidden, rows = product(cell.gates(), H);
    if (!holds(table, product(run.layers, D, count_weights(run)))) return fault;
    for (int64_t layer = 0; layer < run.layers; ++layer)
        for (int64_t d = 0; d < D; ++d) {
            const Weights w = weights_of(run, table, layer, d);
            const int64_t inputs = layer ? product(D, P) : run.inputs;
            if (!holds(w.w_ih, product(rows, inputs)) || !holds(w.w_hh, product(rows, P))) return fault;
            if (run.has_biases && (!holds(w.b_ih, rows) || !holds(w.b_hh, rows))) return fault;
            if (run.projects && !holds(w.w_hr, product(P, H))) return fault;
        }
    return nullptr;
}

inline Fault check_arrays(const Run& run, const CellTable& cell) {
    const int64_t D = run.directions, L = run.layers, P = run.fed_back, H = run.hidden;
    const int64_t x = product(run.input_is_padded ? run.padded_rows : run.rows, run.inputs);
    const int64_t output = product(run.output_is_padded ? run.padded_rows : run.rows, D, P);
    if (!holds(run.x, x)) return "input";
    if (!fits(run.output, output)) return "output";
    if (!fits(run.d_output, output) || !fits(run.dx, x)) return "gradients";
    const int64_t h = product(L, D, run.batch, P), c = cell.has_c ? product(L, D, run.batch, H) : 0;
    for (const Array* array : {&run.h_first, &run.h_last, &run.dh_last, &run.dh_first})
        if (!fits(*array, h)) return "states";
    for (const Array* array : {&run.c_first, &run.c_last, &run.dc_last, &run.dc_first})
        if (!fits(*array, c)) return "states";
    if (cell.has_c && ((run.h_last.data && !run.c_last.data) || !run.h_first.data != !run.c_first.data))
        return "states";
    if (!fits(run.dropped, run.batch)) return "dropped states";
    int64_t saved = 0;
    for (int64_t layer = 0; layer < L; ++layer) saved = sum(saved, Saved(run, cell, layer).end);
    if (!fits(run.saved, saved)) return "saved tensors";
    if (const Fault fault = check_weights(run, cell, run.weights, "weights")) return fault;
    return run.gradients.data ? check_weights(run, cell, run.gradients, "gradients") : nullptr;
}

}  // namespace masked_rnn
