// The gradients of a layer's weights: products of the deltas' columns with states and inputs.
#pragma once

#include <stddef.h>

#include "basics.h"
#include "cell_table.h"
#include "gemm.h"
#include "layer.h"
#include "layout.h"
#include "level.h"
#include "memory.h"
#include "panels.h"
#include "pass.h"

LEVEL_BEGIN

template <class T>
class WeightGradients : LayerSizes {
  public:
    WeightGradients(const LayerSizes& sizes, const Weights* results) : LayerSizes(sizes), results_(results) {}

    void take(Memory& memory) {
        hs_ = memory.take<T>(tasks * Panels<T>::size(DEPTH, P));
        xs_ = memory.take<T>(tasks * Panels<T>::size(DEPTH, I));
        ms_ = memory.take<T>(projects ? tasks * Panels<T>::size(DEPTH, H) : 0);
        columns_ = memory.take<T>(tasks * DEPTH * COLUMNS);
        biases_ = memory.take<T>(tasks * width);
        const ptrdiff_t more = tasks - D;
        more_w_ih_ = memory.take<T>(more * GH * I);
        more_w_hh_ = memory.take<T>(more * GH * P);
        more_w_hr_ = memory.take<T>(projects ? more * P * H : 0);
    }

    void clear(ptrdiff_t task) const {
        const Sums sums = sums_of(task);
        fill(GH * I, sums.w_ih);
        fill(GH * P, sums.w_hh);
        if (projects) fill(P * H, sums.w_hr);
        fill(width, sums.biases);
    }

    // Adds rows of deltas, with the states and inputs at the same steps, to a task's sums.
    void add_rows(ptrdiff_t task, const T* deltas, const T* const* h, const T* const* x, ptrdiff_t rows) const {
        const Sums sums = sums_of(task);
        const Panels<T> hs{hs_ + task * Panels<T>::size(DEPTH, P), rows, P};
        const Panels<T> xs{xs_ + task * Panels<T>::size(DEPTH, I), rows, I};
        const ptrdiff_t stride = delta_row<T>();
        pack_rows(h, hs);
        pack_rows(x, xs);
        for (ptrdiff_t k = 0; k < rows; ++k) add(width, deltas + k * stride, sums.biases);
        T* columns = columns_ + task * DEPTH * COLUMNS;
        for (ptrdiff_t block = 0; block < cell.width; ++block) {
            const auto [in_w_ih, in_w_hh] = cell.blocks[block];
            for (ptrdiff_t j = 0; j < H; j += COLUMNS) {
                const ptrdiff_t count = min(COLUMNS, H - j);
                pack_columns(deltas + block * H + j, stride, rows, count, columns);
                if (in_w_hh != NONE) add_columns(columns, count, hs, sums.w_hh + (in_w_hh * H + j) * P);
                if (in_w_ih != NONE) add_columns(columns, count, xs, sums.w_ih + (in_w_ih * H + j) * I);
            }
        }
        if (!projects) return;
        const Panels<T> ms{ms_ + task * Panels<T>::size(DEPTH, H), rows, H};
        const T* m[TABLE];
        for (ptrdiff_t k = 0; k < rows; ++k) m[k] = deltas + k * stride + width + P;
        pack_rows(m, ms);
        for (ptrdiff_t j = 0; j < P; j += COLUMNS) {
            const ptrdiff_t count = min(COLUMNS, P - j);
            pack_columns(deltas + width + j, stride, rows, count, columns);
            add_columns(columns, count, ms, sums.w_hr + j * H);
        }
    }

    // Adds up the sums of all tasks of a direction. Each of `parts` calls does a part of it.
    void join(ptrdiff_t direction, ptrdiff_t part, ptrdiff_t parts) const {
        const Sums total = sums_of(direction);
        for (ptrdiff_t task = direction + D; task < tasks; task += D) {
            const Sums more = sums_of(task);
            const auto add_part = [&](ptrdiff_t count, const T* from, T* to) {
                const ptrdiff_t first = count * part / parts, stop = count * (part + 1) / parts;
                add(stop - first, from + first, to + first);
            };
            add_part(GH * I, more.w_ih, total.w_ih);
            add_part(GH * P, more.w_hh, total.w_hh);
            if (projects) add_part(P * H, more.w_hr, total.w_hr);
            if (part == 0) add(width, more.biases, total.biases);
        }
        const Weights& results = results_[direction];
        if (part || !results.b_ih.data) return;
        for (ptrdiff_t block = 0; block < cell.width; ++block) {
            const auto [in_w_ih, in_w_hh] = cell.blocks[block];
            const T* from = total.biases + block * H;
            if (in_w_ih != NONE) copy(H, from, in<T>(results.b_ih) + in_w_ih * H);
            if (in_w_hh != NONE) copy(H, from, in<T>(results.b_hh) + in_w_hh * H);
        }
    }

  private:
    // The columns of the deltas that are packed at once: with 256 rows of floats 96 KiB, in the second-level cache.
    static constexpr ptrdiff_t COLUMNS = 96;
    static_assert(COLUMNS % TILE_ROWS == 0);

    // What a task has summed so far.
    struct Sums {
        T *w_ih, *w_hh, *w_hr, *biases;
    };

    const Weights* results_;
    T *hs_, *xs_, *ms_, *columns_;  // of each task: panels, and packed columns
    T *biases_, *more_w_ih_, *more_w_hh_, *more_w_hr_;

    // The first task of a direction sums in the result.
    Sums sums_of(ptrdiff_t task) const {
        T* biases = biases_ + task * width;
        if (task < D) {
            const Weights& w = results_[task];
            return {in<T>(w.w_ih), in<T>(w.w_hh), in<T>(w.w_hr), biases};
        }
        const ptrdiff_t more = task - D;
        return {more_w_ih_ + more * GH * I, more_w_hh_ + more * GH * P, more_w_hr_ + more * P * H, biases};
    }

    // C += Aᵀ B, for packed columns of A.
    void add_columns(const T* columns, ptrdiff_t count, const Panels<T>& b, T* c) const {
        T* rows[COLUMNS];
        for (ptrdiff_t r = 0; r < count; ++r) rows[r] = c + r * b.columns;
        multiply_columns(columns, count, b, rows);
    }
};

LEVEL_END
