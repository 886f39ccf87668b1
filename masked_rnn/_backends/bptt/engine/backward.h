// The backward loop through time: computes the states' gradients and the deltas, last step first, and from them the
// gradients of the weights and of the input.
#pragma once

#include <stddef.h>

#include "basics.h"
#include "cells.h"
#include "gemm.h"
#include "layer.h"
#include "layout.h"
#include "level.h"
#include "pass.h"
#include "threads.h"
#include "weight_gradients.h"
#include "weights.h"

LEVEL_BEGIN
namespace masked_rnn::LEVEL {

template <class T>
class BackwardPass : Pass {
  public:
    explicit BackwardPass(const Backward& record)
        : Pass(record.layer),
          record_(record),
          steps_(Steps<T>::of(layer.cell)),
          wants_x_(record.dx.data),
          wants_weights_(record.gradients[0].w_hh.data),
          gradients_(*this, record.gradients) {}

    Fault operator()() {
        if (!memory_.allocate([&] { take_memory(); })) return NO_MEMORY;
        pack(weights_, wants_x_ ? D : 0,
             [&](ptrdiff_t d) { clear_padding(dx_of(d), dx_rows(), I, is_there_ + d * dx_rows()); });
        run_tasks(layer, tasks, [&](ptrdiff_t task) {
            Waiting waiting(task, deltas_ + task * deltas_of_task());
            if (wants_weights_) gradients_.begin(task);
            run_blocks(task, [&](const SequenceBlock& block) { run_block(block, waiting); });
            multiply(waiting, task % D);
        });
        if (wants_weights_) gradients_.finish();
        if (wants_x_ && D == 2) {
            const ptrdiff_t count = dx_rows() * I, part = divide_up(count, layer.threads);
            run_tasks(layer, layer.threads, [&](ptrdiff_t k) {
                const ptrdiff_t begin = min(k * part, count);
                add(min(part, count - begin), dx_of(1) + begin, dx_of(0) + begin);
            });
        }
        return nullptr;
    }

  private:
    const Backward& record_;
    const Steps<T> steps_;
    const bool wants_x_, wants_weights_;
    LayerWeights<T, false> weights_;
    WeightGradients<T> gradients_;
    // Of each task: deltas of some rows, the gradients of the LSTM's m, and m again.
    T *deltas_, *dms_, *ms_;
    unsigned char* is_there_;

    void take_memory() {
        weights_.take(layer, cell, wants_x_, layer.steps > 1 || record_.wants_first, memory_);
        deltas_ = memory_.take<T>(tasks * deltas_of_task());
        dms_ = memory_.take<T>(projects ? tasks * MOST_ROWS * H : 0);
        ms_ = memory_.take<T>(tasks * MOST_ROWS * H);
        if (wants_weights_) gradients_.take(memory_);
        is_there_ = memory_.take<unsigned char>(D * dx_rows());
    }

    ptrdiff_t dx_rows() const { return wants_x_ && I ? record_.dx.size / I : 0; }

    T* dx_of(ptrdiff_t direction) const { return data_of<T>(direction ? record_.dx_reverse : record_.dx); }

    ptrdiff_t deltas_of_task() const {
        return delta_row_size<T>() * (wants_weights_ && gradients_.keeps_rows ? split.most_rows : DEPTH);
    }

    // Rows of a task that were not yet multiplied for the gradients of the weights and the input.
    struct Waiting {
        const ptrdiff_t task;
        T* deltas;
        ptrdiff_t rows = 0;
        const T *delta[MOST_ADDRESSES], *h[MOST_ADDRESSES], *x[MOST_ADDRESSES];
        T* dx[MOST_ADDRESSES];

        Waiting(ptrdiff_t task, T* deltas) : task(task), deltas(deltas) {}
    };

    void multiply(Waiting& waiting, ptrdiff_t direction) const {
        const ptrdiff_t rows = waiting.rows;
        if (wants_weights_) gradients_.add_rows(waiting.task, waiting.deltas, waiting.h, waiting.x, rows);
        if (wants_x_) {
            for (ptrdiff_t k = 0; k < rows; ++k) waiting.delta[k] += row_size - GH;
            weights_.w_ih[direction].multiply(waiting.delta, AT_ZERO, nullptr, waiting.dx, rows);
        }
        if (wants_weights_ && gradients_.keeps_rows) waiting.deltas += rows * delta_row_size<T>();
        waiting.rows = 0;
    }

    // A block on its way through the steps.
    struct Way {
        const SequenceBlock& block;
        Waiting& waiting;
        ptrdiff_t length[MOST_ROWS];
        T *dh[MOST_ROWS], *dc[MOST_ROWS] = {}, *dm[MOST_ROWS];  // of each sequence; dm is dh unless h is a projection

        Way(const SequenceBlock& block, Waiting& waiting) : block(block), waiting(waiting) {
            block.find_lengths(length);
        }
    };

    void run_block(const SequenceBlock& block, Waiting& waiting) const {
        Way way(block, waiting);
        for (ptrdiff_t i = 0; i < block.active(0); ++i) {
            way.dh[i] = block.state<T>(record_.dh, block.place(i));
            if (cell.has_c) way.dc[i] = block.state<T>(record_.dc, block.place(i));
            way.dm[i] = projects ? dms_ + (waiting.task * MOST_ROWS + i) * H : way.dh[i];
        }
        for (ptrdiff_t t = way.length[0] - 1; t >= 0; --t) {
            if (waiting.rows + block.active(t) > DEPTH) multiply(waiting, block.direction);
            run_step(way, t);
        }
    }

    void run_step(Way& way, ptrdiff_t t) const {
        const SequenceBlock& block = way.block;
        const ptrdiff_t d = block.direction, active = block.active(t);
        Waiting& waiting = way.waiting;
        for (ptrdiff_t i = 0; record_.d_output.data && i < active; ++i) {
            const ptrdiff_t row = block.caller_row(t, block.place(i), way.length[i], layer.output_is_padded);
            add(P, data_of<const T>(record_.d_output) + row * D * P + d * P, way.dh[i]);
        }
        if (projects) weights_.w_hr[d].multiply(way.dh, AT_ZERO, nullptr, way.dm, active);
        for (ptrdiff_t i = 0; i < active; ++i) {
            const ptrdiff_t place = block.place(i), before = block.row_before(t, place), k = waiting.rows + i;
            const ptrdiff_t after = block.row_after(t, place);
            const ptrdiff_t row = block.caller_row(t, place, way.length[i], layer.input_is_padded);
            T* delta = waiting.deltas + k * delta_row_size<T>();
            // Every cell gets room for m; only that of an LSTM with proj_size is read.
            T* m_again = ms_ + (waiting.task * MOST_ROWS + i) * H;
            if (projects) {
                copy(P, way.dh[i], delta + row_size);
                m_again = delta + row_size + P;
            }
            const T* activations = data_of<const T>(layer.activations);
            if (cell.saves_activations) activations += block.row_of_activations(t, place) * row_size;
            const T *history = data_of<const T>(layer.h_history), *c = nullptr, *c_after = nullptr;
            if (cell.has_c) {
                c = data_of<const T>(layer.c_history) + before * H;
                c_after = data_of<const T>(layer.c_history) + after * H;
            }
            waiting.delta[k] = delta;
            waiting.h[k] = history + before * P;
            waiting.x[k] = data_of<const T>(layer.x) + row * I;
            if (wants_x_) waiting.dx[k] = dx_of(d) + row * I;
            steps_.step_back(H, RowBack<T>{activations, waiting.h[k], c, history + after * P, c_after, way.dm[i],
                                           way.dc[i], delta, m_again});
        }
        if (t || record_.wants_first)
            weights_.w_hh[d].multiply(waiting.delta + waiting.rows, cell.keeps_dh ? AT_C : AT_ZERO, nullptr, way.dh,
                                      active);
        waiting.rows += active;
    }
};

}  // namespace masked_rnn::LEVEL
LEVEL_END
