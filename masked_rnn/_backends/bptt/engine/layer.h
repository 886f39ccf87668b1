// The records of one layer, which stack.h makes of Python's record and the loops take.
//
// T steps, R rows that run, B sequences that have a step, N all, I input, H hidden, D directions, P state that is fed
// back (H, or proj_size).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cell_table.h"
#include "interface.h"

namespace masked_rnn {

struct Weights {
    Array w_ih;  // (gates H, I)
    Array w_hh;  // (gates H, P)
    Array b_ih;  // (gates H), or none
    Array b_hh;  // (gates H)
    Array w_hr;  // (P, H), or none
};

// One state of each direction and sequence, at data + direction * direction_stride + sequence * sequence_stride.
struct States {
    void* data;
    ptrdiff_t direction_stride, sequence_stride;
};

// What both passes know of one layer.
struct Layer {
    int64_t cell;
    int64_t item_bytes;
    int64_t directions;
    int64_t batch;
    int64_t sequences;
    int64_t steps;  // at which a sequence runs
    int64_t rows;
    int64_t inputs;
    int64_t hidden;
    int64_t fed_back;
    int64_t threads;
    Parallel parallel;
    int64_t input_is_padded;                 // 1: x has the padded layout; 0: that of the rows that run
    int64_t output_is_padded;                // the same for the output
    ptrdiff_t sequence_stride, step_stride;  // of the padded layout, in rows, if there is no index
    Array lengths;                           // as in Run; the next two tables are always there
    Array sizes;
    Array starts;
    Array index;
    Array order;
    Array x;  // (rows, I)
    Weights weights[2];
    Array h_history;    // (D, B + R, P): the initial states, then the state after each row. None: nothing is saved
    Array c_history;    // (D, B + R, H): the same for the LSTM's c
    Array activations;  // (D, R, blocks H)
};

struct Forward {
    Layer layer;
    States h;  // the initial states, replaced by the last ones
    States c;
    Array output;  // (rows, D P)
};

struct Backward {
    Layer layer;
    Array d_output;    // (rows, D P), or none
    bool wants_first;  // whether the gradients of the initial states are wanted
    States dh;         // the gradients of the last states, replaced by those of the initial ones
    States dc;
    Array dx;              // (rows, I), or none
    Array dx_reverse;      // the same for the second direction, which is added to dx
    Weights gradients[2];  // or none
};

// The loops for one kind of CPU.
struct Loops {
    CellTable (*table_of)(int64_t cell);
    Fault (*forward)(const Forward&);
    Fault (*backward)(const Backward&);
};

}  // namespace masked_rnn
