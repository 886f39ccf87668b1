// The record that Python passes to the library. `../record.py` has the same fields, in the same order.
//
// T steps, R rows that run, B sequences that have a step, N all, I input, H hidden, D directions, L layers, P state
// that is fed back (H, or proj_size).
#pragma once

#include <stdint.h>

namespace masked_rnn {

constexpr int64_t INTERFACE = 2;  // increase it when the record below changes
static_assert(sizeof(void*) == 8, "Python writes each address as a number of 64 bits.");

enum Cell : int64_t { GRU, LSTM, RNN_TANH, RNN_RELU, CELL_COUNT };

// An address, and the number of elements there. Address 0: no array.
struct Array {
    void* data;
    int64_t size;
};

template <class T>
T* data_of(const Array& array) {
    return static_cast<T*>(array.data);
}

// The address of GOMP_parallel, which runs a function on several threads and waits for them. 0: start new threads.
using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// One pass over a stack of layers. A number that a pass does not need is 0.
//
// Which rows run is given in one of two ways. By `lengths`: sequence n runs its first lengths[n] steps; without lengths
// all steps run. Or, if `starts` is given, by the tables of a plan.
struct Run {
    int64_t cell;
    int64_t item_bytes;  // 4: float, 8: double
    int64_t layers;
    int64_t directions;
    int64_t inputs;    // I
    int64_t hidden;    // H
    int64_t fed_back;  // P
    int64_t has_biases;
    int64_t projects;
    int64_t batch;            // N
    int64_t steps;            // T
    int64_t batch_first;      // 1: the padded layout is (N, T); 0: (T, N)
    int64_t sequences;        // B
    int64_t rows;             // R
    int64_t padded_rows;      // the rows of the padded layout: N T, or what the plan's index points into
    int64_t input_is_padded;  // 1: x has a row for each of them; 0: for each row that runs, in the plan's order
    int64_t output_is_padded;
    int64_t first_is_flat;  // the layout of first states and their gradients. 1: (N, L D P); 0: (L D, N, P)
    int64_t last_is_flat;   // the same for last states
    int64_t threads;
    Parallel parallel;
    Array lengths;  // int64 (N); none: all are T
    Array sizes;    // int64 (T + 1): the number of sequences at each step, then 0
    Array starts;   // int64 (T + 1): the first row of each step, then R
    Array index;    // int64 (R): the place of each row in the padded layout; none: in order
    Array order;    // int64 (B): the sequence at each sorted place; none: in order
    Array dropped;  // bytes (N): 1 where the forward direction starts from zeros; none: nowhere
    Array weights;  // Array (L D (2 to 5)): of each layer and direction w_ih, w_hh, biases, w_hr
    Array x;        // (rows, I)
    Array h_first;  // the initial states; none: zeros
    Array c_first;
    Array h_last;  // gets the last states
    Array c_last;
    Array output;  // (rows, D P), or none
    Array saved;   // what backward needs, see sizes.h; none: nothing is saved
    // Backward reads the gradients of output and last states (none: zero), and writes the others (none: not wanted).
    Array d_output;
    Array dh_last;
    Array dc_last;
    Array dh_first;
    Array dc_first;
    Array dx;
    Array gradients;  // Array: as `weights`
};

// Null: all is well. Else the reason why a call can't run.
using Fault = const char*;
constexpr Fault NO_MEMORY = "no memory";

}  // namespace masked_rnn
