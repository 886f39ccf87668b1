// How a layer's work is divided, and what a row of scratch memory holds.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "basics.h"
#include "layer.h"
#include "level.h"

LEVEL_BEGIN
namespace masked_rnn::LEVEL {

// The most sequences in a block, and the most rows in an input product. Each block reads the whole weights at each
// step, so fewer would cost more for weights that do not fit the cache than their activations' bytes would save.
constexpr ptrdiff_t MOST_ROWS = 64;
constexpr ptrdiff_t DEPTH = 256;             // the rows that are added to the weights' gradients at once
constexpr ptrdiff_t MOST_ADDRESSES = DEPTH;  // the most rows in a table of addresses
static_assert(MOST_ADDRESSES >= MOST_ROWS);

// A row of scratch memory, of a GRU (forward, backward) and of an LSTM with proj_size (backward):
//
//     forward     g    r    z    n    ROW_GAP          blocks of H numbers, see cells.h
//      W_ih x          r    z    n                     the product is a part of the last blocks
//      W_hh h     g    r    z                          and of the first ones
//     backward    dg   dr   dz   dn   ROW_GAP
//     proj_size   di   df   dg   do   dh   m  ROW_GAP  dh has P numbers; dh and m are factors of W_hr's gradient
//
// Without the gap, rows could be a multiple of 4 KiB apart. They would then compete for the same places of the
// first-level cache, and a load from one would wait for a store to another.
template <class T>
constexpr ptrdiff_t ROW_GAP = 64 / sizeof(T);  // a cache line

// The sequences of a direction are dealt out to workers in turns, so that each worker gets long and short ones. Its
// work is a task: some blocks, one after the other, each of sequences that are next to each other on that worker. So
// their lengths are alike, and one block's rows are close together in memory.
struct WorkSplit {
    ptrdiff_t workers;
    ptrdiff_t block_size;  // the most sequences in a block
    ptrdiff_t most_rows;   // of a worker

    explicit WorkSplit(const Layer& layer) {
        workers = max(1, min(divide_up(layer.threads, layer.directions), layer.sequences));
        const ptrdiff_t of_worker = divide_up(layer.sequences, workers);
        block_size = divide_up(of_worker, divide_up(of_worker, MOST_ROWS));
        most_rows = 0;
        for (ptrdiff_t t = 0; t < layer.steps; ++t)
            most_rows += divide_up(data_of<const int64_t>(layer.sizes)[t], workers);
    }
};

// Some sequences of a direction that run together, by their sorted places: longest first.
struct SequenceBlock {
    const Layer& layer;
    ptrdiff_t direction, first, stride, size;

    ptrdiff_t place(ptrdiff_t i) const { return first + i * stride; }

    // The number of the block's sequences that run at step t.
    ptrdiff_t active(ptrdiff_t t) const {
        const ptrdiff_t all = data_of<const int64_t>(layer.sizes)[t];
        return all <= first ? 0 : min(size, stride == 1 ? all - first : (all - first - 1) / stride + 1);
    }

    // Finds the number of steps of each sequence.
    void find_lengths(ptrdiff_t (&length)[MOST_ROWS]) const {
        for (ptrdiff_t i = 0, steps = layer.steps; i < active(0); ++i) {
            while (active(steps - 1) <= i) --steps;
            length[i] = steps;
        }
    }

    ptrdiff_t start(ptrdiff_t t) const { return data_of<const int64_t>(layer.starts)[t]; }

    ptrdiff_t sequence(ptrdiff_t place) const {
        const int64_t* order = data_of<const int64_t>(layer.order);
        return order ? order[place] : place;
    }

    template <class T>
    T* state(const States& states, ptrdiff_t place) const {
        return static_cast<T*>(states.data) + direction * states.direction_stride +
               sequence(place) * states.sequence_stride;
    }

    // The row of the state before step t in the history, (D, B + R).
    ptrdiff_t row_before(ptrdiff_t t, ptrdiff_t place) const {
        return direction * (layer.sequences + layer.rows) + place + (t ? layer.sequences + start(t - 1) : 0);
    }

    // The row of the state after step t in the history.
    ptrdiff_t row_after(ptrdiff_t t, ptrdiff_t place) const { return row_before(t + 1, place); }

    // The row of step t in the activations, (D, R).
    ptrdiff_t row_of_activations(ptrdiff_t t, ptrdiff_t place) const {
        return direction * layer.rows + start(t) + place;
    }

    // The row of step t in the caller's input or output. The second direction reads a sequence of `length` steps from
    // its end.
    ptrdiff_t caller_row(ptrdiff_t t, ptrdiff_t place, ptrdiff_t length, bool is_padded) const {
        const ptrdiff_t step = direction ? length - 1 - t : t, row = start(step) + place;
        if (!is_padded) return row;
        if (const int64_t* index = data_of<const int64_t>(layer.index)) return index[row];
        return sequence(place) * layer.sequence_stride + step * layer.step_stride;
    }
};

}  // namespace masked_rnn::LEVEL
LEVEL_END
