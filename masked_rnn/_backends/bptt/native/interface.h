// What Python hands over, and what it gets back. `../native.py` fills these records; both sides have the same order.
//
// T steps, R rows that run, B sequences that have a step, N all, I input, H hidden, D directions, P state that is fed
// back (H, or proj_size).
#pragma once

#include <cstddef>
#include <cstdint>

namespace masked_rnn {

constexpr int64_t INTERFACE = 1;  // counts up when a record below changes

enum Cell : int64_t { GRU, LSTM, RNN_TANH, RNN_RELU };

// How many gates a cell has, and of how many blocks of H numbers its activations are made.
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

// Memory and how many numbers it holds. An address of 0: there is none.
struct Array {
    void* data;
    int64_t size;
};

// Runs a function on several threads and waits for them: GOMP_parallel. An address of 0: threads of our own do.
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
    int64_t gather;   // x lies as the caller's input does; 0: as the rows that run
    int64_t scatter;  // the same for the output
    Array sizes;      // int64 (T + 1): sequences at each step, and 0
    Array starts;     // int64 (T + 1): the first row of each step, and R
    Array index;      // int64 (R): where each row lies in the caller's input; none: in order
    Array order;      // int64 (B): the sequence at each sorted place; none: as they come
    Array x;          // (rows, I)
    int64_t x_row;    // from one row of x to the next, in numbers
    Weights weights[2];
    Array history;  // (D, B + R, P): the initial states, then the state after each row. None: nothing is saved
    Array cells;    // (D, B + R, H): the same of the LSTM's c
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

// Why a call can't run. The messages are in library.cpp.
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
