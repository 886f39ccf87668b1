// The records that Python passes to the library. `../native.py` fills them, in the same order.
//
// T steps, R rows that run, B sequences that have a step, N all, I input, H hidden, D directions, P state that is fed
// back (H, or proj_size).
#pragma once

#include <cstddef>
#include <cstdint>

namespace masked_rnn {

constexpr int64_t INTERFACE = 1;  // increase it when a record below changes

enum Cell : int64_t { GRU, LSTM, RNN_TANH, RNN_RELU };

// The number of a cell's gates, and of blocks of H numbers in its activations.
struct CellSizes {
    ptrdiff_t gates, width;
    bool has_c, saves_buffer;
};

inline CellSizes sizes_of(int64_t cell) {
    switch (cell) {
        case GRU: return {3, 4, false, true};
        case LSTM: return {4, 4, true, true};
        default: return {1, 1, false, false};
    }
}

// An address, and the number of elements there. Address 0: no array.
struct Array {
    void* data;
    int64_t size;
};

// The address of GOMP_parallel, which runs a function on several threads and waits for them. 0: start new threads.
using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

struct Weights {
    Array w_ih;  // (gates H, I)
    Array w_hh;  // (gates H, P)
    Array b_ih;  // (gates H), or none
    Array b_hh;  // (gates H)
    Array w_hr;  // (P, H), or none
};

struct Layer {
    int64_t cell;
    int64_t item_bytes;  // 4: float, 8: double
    int64_t directions;
    int64_t batch;      // N
    int64_t sequences;  // B
    int64_t steps;      // T
    int64_t rows;       // R
    int64_t inputs;     // I
    int64_t hidden;     // H
    int64_t fed_back;   // P
    int64_t threads;
    Parallel parallel;
    int64_t gather;   // 1: x has the layout of the caller's input; 0: that of the rows that run
    int64_t scatter;  // the same for the output
    Array sizes;      // int64 (T + 1): the number of sequences at each step, then 0
    Array starts;     // int64 (T + 1): the first row of each step, then R
    Array index;      // int64 (R): the place of each row in the caller's input; none: in order
    Array order;      // int64 (B): the sequence at each sorted place; none: in order
    Array x;          // (rows, I)
    int64_t x_row;    // the stride of a row of x, in numbers
    Weights weights[2];
    Array history;  // (D, B + R, P): the initial states, then the state after each row. None: nothing is saved
    Array cells;    // (D, B + R, H): the same for the LSTM's c
    Array buffer;   // (D, R, width H): the activations of each row
};

struct Forward {
    Layer layer;
    Array h;       // (D, N, P): the initial states, replaced by the last ones
    Array c;       // (D, N, H)
    Array output;  // (rows, D P)
    int64_t output_row;
};

struct Backward {
    Layer layer;
    Array d_output;  // (rows, D P), or none
    int64_t d_output_row;
    Array dh;              // (D, N, P): the gradients of the last states, replaced by those of the initial ones
    Array dc;              // (D, N, H)
    Array dx;              // (D, rows, I), or none
    Weights gradients[2];  // or none
};

// The reasons why a call can't run. ../library.py has the messages.
enum Fault : int64_t {
    NONE,
    BAD_LAYER,
    BAD_STEPS,
    BAD_INDEX,
    BAD_ORDER,
    BAD_INPUT,
    BAD_WEIGHTS,
    BAD_STATES,
    BAD_SAVED,
    BAD_OUTPUT,
    BAD_GRADIENTS,
    NO_MEMORY,
};

}  // namespace masked_rnn
