// The forward loop through time: computes activations and states, first step first.
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
#include "weights.h"

LEVEL_BEGIN
namespace masked_rnn::LEVEL {

template <class T>
class ForwardPass : Pass {
  public:
    explicit ForwardPass(const Forward& record)
        : Pass(record.layer), record_(record), steps_(Steps<T>::of(layer.cell)), saves_(layer.h_history.data) {}

    Fault operator()() {
        if (!memory_.allocate([&] { take_memory(); })) return NO_MEMORY;
        pack(weights_, 1,
             [&](ptrdiff_t) { clear_padding(data_of<T>(record_.output), output_rows(), D * P, is_there_); });
        run_tasks(layer, tasks, [&](ptrdiff_t task) {
            run_blocks(task, [&](const SequenceBlock& block) { run_block(block, task); });
        });
        return nullptr;
    }

  private:
    const Forward& record_;
    const Steps<T> steps_;
    const bool saves_;
    LayerWeights<T, true> weights_;
    // Of each task: activations that are not saved, the biases that each row starts from, and the LSTM's m.
    T *scratch_, *biases_, *ms_;
    unsigned char* is_there_;

    ptrdiff_t scratch_row_size() const { return row_size + ROW_GAP<T>; }
    ptrdiff_t output_rows() const { return record_.output.size / (D * P); }

    void take_memory() {
        weights_.take(layer, cell, true, true, memory_);
        scratch_ = memory_.take<T>(tasks * MOST_ROWS * scratch_row_size());
        biases_ = memory_.take<T>(tasks * row_size);
        ms_ = memory_.take<T>(projects ? tasks * MOST_ROWS * H : 0);
        is_there_ = memory_.take<unsigned char>(output_rows());
    }

    // The blocks' biases: b_ih + b_hh, except for the GRU's g and n, which are apart.
    void write_biases(const Weights& w, T* row) const {
        fill(row_size, row);
        for (ptrdiff_t gate = 0; w.b_ih.data && gate < cell.block_count; ++gate, row += H) {
            const auto [in_w_ih, in_w_hh] = cell.blocks[gate];
            if (in_w_ih != NONE) add(H, data_of<const T>(w.b_ih) + in_w_ih * H, row);
            if (in_w_hh != NONE) add(H, data_of<const T>(w.b_hh) + in_w_hh * H, row);
        }
    }

    // A block on its way through the steps.
    struct Way {
        const SequenceBlock& block;
        T *scratch, *biases, *ms;
        ptrdiff_t length[MOST_ROWS];
        // Of each sequence: the states before and after a step. Without a history both are the caller's last state.
        T *h[MOST_ROWS], *c[MOST_ROWS] = {}, *h_after[MOST_ROWS], *c_after[MOST_ROWS] = {};
        T* activations[MOST_ADDRESSES];  // of the steps whose input product is there

        explicit Way(const SequenceBlock& block) : block(block) { block.find_lengths(length); }
    };

    void run_block(const SequenceBlock& block, ptrdiff_t task) const {
        Way way(block);
        way.scratch = scratch_ + task * MOST_ROWS * scratch_row_size();
        way.biases = biases_ + task * row_size;
        way.ms = ms_ + task * MOST_ROWS * H;
        write_biases(layer.weights[block.direction], way.biases);
        take_states(way);
        for (ptrdiff_t t = 0, stop; t < way.length[0]; t = stop) {
            stop = multiply_inputs(way, t);
            T** activations = way.activations;
            for (ptrdiff_t s = t; s < stop; activations += block.active(s++)) run_step(way, s, activations);
        }
    }

    void take_states(Way& way) const {
        const SequenceBlock& block = way.block;
        for (ptrdiff_t i = 0; i < block.active(0); ++i) {
            const ptrdiff_t place = block.place(i), row = block.row_before(0, place);
            way.h[i] = way.h_after[i] = block.state<T>(record_.h, place);
            if (saves_) copy(P, way.h[i], data_of<T>(layer.h_history) + row * P);
            if (!cell.has_c) continue;
            way.c[i] = way.c_after[i] = block.state<T>(record_.c, place);
            if (saves_) copy(H, way.c[i], data_of<T>(layer.c_history) + row * H);
        }
    }

    // Computes W_ih x and the biases for some steps from t on. Returns the step after them.
    ptrdiff_t multiply_inputs(Way& way, ptrdiff_t t) const {
        const SequenceBlock& block = way.block;
        const ptrdiff_t begin = row_size - GH;  // the first number of a row that the product is a part of
        const T* x[MOST_ADDRESSES];
        T* product[MOST_ADDRESSES];
        ptrdiff_t rows = 0;
        for (ptrdiff_t active; t < way.length[0] && (active = block.active(t), !rows || rows + active <= MOST_ROWS);
             ++t) {
            for (ptrdiff_t i = 0; i < active; ++i, ++rows) {
                const ptrdiff_t place = block.place(i);
                x[rows] =
                    data_of<const T>(layer.x) + I * block.caller_row(t, place, way.length[i], layer.input_is_padded);
                T*& row = way.activations[rows];
                row = way.scratch + rows * scratch_row_size();
                if (saves_ && cell.saves_activations)
                    row = data_of<T>(layer.activations) + block.row_of_activations(t, place) * row_size;
                copy(begin, way.biases, row);
                product[rows] = row + begin;
            }
        }
        weights_.w_ih[block.direction].multiply(x, AT_ROW, way.biases + begin, product, rows);
        return t;
    }

    void run_step(Way& way, ptrdiff_t t, T* const* activations) const {
        const SequenceBlock& block = way.block;
        const ptrdiff_t d = block.direction, active = block.active(t);
        for (ptrdiff_t i = 0; saves_ && i < active; ++i) {
            const ptrdiff_t before = block.row_before(t, block.place(i)), after = block.row_after(t, block.place(i));
            T *h = data_of<T>(layer.h_history), *c = data_of<T>(layer.c_history);
            way.h[i] = h + before * P, way.h_after[i] = h + after * P;
            if (cell.has_c) way.c[i] = c + before * H, way.c_after[i] = c + after * H;
        }
        weights_.w_hh[d].multiply(way.h, AT_C, nullptr, activations, active);
        T* ms[MOST_ROWS];  // h, or what is projected to h
        for (ptrdiff_t i = 0; i < active; ++i) {
            ms[i] = projects ? way.ms + i * H : way.h_after[i];
            steps_.step(H, Row<T>{activations[i], way.h[i], way.c[i], ms[i], way.c_after[i]});
        }
        if (projects) weights_.w_hr[d].multiply(ms, AT_ZERO, nullptr, way.h_after, active);
        for (ptrdiff_t i = 0; i < active; ++i) {
            const ptrdiff_t place = block.place(i);
            const ptrdiff_t row = block.caller_row(t, place, way.length[i], layer.output_is_padded);
            T* output = data_of<T>(record_.output) + row * D * P + d * P;
            if (output != way.h_after[i]) copy(P, way.h_after[i], output);  // the history may be the output
            if (saves_ && t == way.length[i] - 1) {
                copy(P, way.h_after[i], block.state<T>(record_.h, place));
                if (cell.has_c) copy(H, way.c_after[i], block.state<T>(record_.c, place));
            }
        }
    }
};

}  // namespace masked_rnn::LEVEL
LEVEL_END
