// The gradients of a layer's weights: products of the deltas' columns with states and inputs.
//
// Each worker adds its rows to sums of its own, some rows at a time, and at the end these are added up. Where the
// weights are larger than what all rows need, all rows are kept instead, and each number of a gradient is written once.
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
#include "threads.h"

LEVEL_BEGIN
namespace masked_rnn::LEVEL {

template <class T>
class WeightGradients : LayerSizes {
  public:
    // Whether all rows are kept. Then the deltas that are added must stay.
    const bool keeps_rows;

    WeightGradients(const LayerSizes& sizes, const Weights* results)
        : LayerSizes(sizes),
          keeps_rows(layer.rows * (delta_row_size<T>() + P + I) <= GH * (P + I)),
          results_(results),
          room_(keeps_rows ? split.most_rows : DEPTH),
          most_slices_(keeps_rows ? divide_up(split.most_rows, DEPTH - MOST_ROWS) + 1 : 1) {}

    void take(Memory& memory) {
        slices_ = memory.take<Slice>(tasks * most_slices_);
        counts_ = memory.take<ptrdiff_t>(tasks);
        hs_ = memory.take<T>(tasks * Panels<T>::size(room_, P));
        xs_ = memory.take<T>(tasks * Panels<T>::size(room_, I));
        ms_ = memory.take<T>(projects ? tasks * Panels<T>::size(room_, H) : 0);
        columns_ = memory.take<T>(max(tasks, layer.threads) * DEPTH * COLUMNS);
        biases_ = memory.take<T>(tasks * row_size);
        const ptrdiff_t more = keeps_rows ? 0 : tasks - D;
        more_w_ih_ = memory.take<T>(more * GH * I);
        more_w_hh_ = memory.take<T>(more * GH * P);
        more_w_hr_ = memory.take<T>(projects ? more * P * H : 0);
    }

    void begin(ptrdiff_t task) const { counts_[task] = 0; }

    // Adds rows of deltas of a task, with the states and inputs at the same steps.
    void add_rows(ptrdiff_t task, const T* deltas, const T* const* h, const T* const* x, ptrdiff_t rows) const {
        const ptrdiff_t number = counts_[task]++, stride = delta_row_size<T>();
        Slice& slice = slices_[task * most_slices_ + (keeps_rows ? number : 0)];
        const ptrdiff_t first = keeps_rows && number ? (&slice)[-1].first + (&slice)[-1].rows : 0;
        const auto panels = [&](T* all, ptrdiff_t columns) {
            T* begin = all + task * Panels<T>::size(room_, columns) + Panels<T>::size(first, columns);
            return Panels<T>{begin, rows, columns};
        };
        slice = {deltas, first, rows, panels(hs_, P), panels(xs_, I), panels(ms_, H)};
        pack_rows(h, slice.hs);
        pack_rows(x, slice.xs);
        if (projects) {
            const T* m[MOST_ADDRESSES];
            for (ptrdiff_t k = 0; k < rows; ++k) m[k] = deltas + k * stride + row_size + P;
            pack_rows(m, slice.ms);
        }
        if (keeps_rows) return;
        const Sums sums = sums_of(task);
        if (number == 0) fill(row_size, sums.biases);
        for (ptrdiff_t k = 0; k < rows; ++k) add(row_size, deltas + k * stride, sums.biases);
        for (ptrdiff_t part = 0; part < parts(COLUMNS); ++part)
            multiply(slice, part_of(part, COLUMNS), sums, number ? AT_C : AT_ZERO, columns_ + task * DEPTH * COLUMNS);
    }

    // Computes the results, once all rows are there.
    void finish() const {
        if (!keeps_rows) return run_tasks(layer, D * layer.threads, [&](ptrdiff_t k) { join(k % D, k / D); });
        const ptrdiff_t columns = min(COLUMNS, divide_up(divide_up(H, layer.threads), TILE_ROWS) * TILE_ROWS);
        run_tasks(layer, layer.threads, [&](ptrdiff_t k) {
            for (ptrdiff_t part = k; part < D * parts(columns); part += layer.threads)
                write(part % D, part_of(part / D, columns), columns_ + k * DEPTH * COLUMNS);
        });
    }

  private:
    // The most columns of the deltas that are packed at once: with 256 rows of floats 96 KiB, in the second-level
    // cache.
    static constexpr ptrdiff_t COLUMNS = 96;
    static_assert(COLUMNS % TILE_ROWS == 0);

    struct Slice {
        const T* deltas;
        ptrdiff_t first, rows;
        Panels<T> hs, xs, ms;
    };

    // What a task has summed so far.
    struct Sums {
        T *w_ih, *w_hh, *w_hr, *biases;
    };

    // Some columns of one block of the deltas, or of the gradient of h after the last block.
    struct Part {
        ptrdiff_t block, begin, count;
    };

    const Weights* results_;
    const ptrdiff_t room_, most_slices_;  // of each task
    Slice* slices_;
    ptrdiff_t* counts_;             // the slices of each task so far
    T *hs_, *xs_, *ms_, *columns_;  // of each task: panels, and packed columns
    T *biases_, *more_w_ih_, *more_w_hh_, *more_w_hr_;

    ptrdiff_t parts(ptrdiff_t columns) const { return (cell.block_count + projects) * divide_up(H, columns); }
    Part part_of(ptrdiff_t number, ptrdiff_t columns) const {
        const ptrdiff_t block = number % (cell.block_count + projects),
                        begin = number / (cell.block_count + projects) * columns;
        return {block, begin, min(columns, (block < cell.block_count ? H : P) - begin)};
    }

    // The first task of a direction sums in the result.
    Sums sums_of(ptrdiff_t task) const {
        T* biases = biases_ + task * row_size;
        if (task < D) {
            const Weights& w = results_[task];
            return {data_of<T>(w.w_ih), data_of<T>(w.w_hh), data_of<T>(w.w_hr), biases};
        }
        const ptrdiff_t more = task - D;
        return {more_w_ih_ + more * GH * I, more_w_hh_ + more * GH * P, more_w_hr_ + more * P * H, biases};
    }

    void multiply(const Slice& slice, const Part& part, const Sums& sums, Start start, T* columns) const {
        const auto [block, begin, count] = part;
        if (count <= 0) return;
        pack_columns(slice.deltas + block * H + begin, delta_row_size<T>(), slice.rows, count, columns);
        const auto to = [&, count = count](const Panels<T>& b, T* c) {
            T* rows[COLUMNS];
            for (ptrdiff_t r = 0; r < count; ++r) rows[r] = c + r * b.columns;
            multiply_columns(columns, count, b, start, rows);
        };
        if (block == cell.block_count) return to(slice.ms, sums.w_hr + begin * H);
        const auto [in_w_ih, in_w_hh] = cell.blocks[block];
        if (in_w_hh != NONE) to(slice.hs, sums.w_hh + (in_w_hh * H + begin) * P);
        if (in_w_ih != NONE) to(slice.xs, sums.w_ih + (in_w_ih * H + begin) * I);
    }

    // Writes a part of a direction's gradients, of all rows.
    void write(ptrdiff_t direction, const Part& part, T* columns) const {
        const Sums sums = sums_of(direction);
        const ptrdiff_t place = part.block * H + part.begin;
        const bool has_bias = part.block < cell.block_count && part.count > 0;
        if (has_bias) fill(part.count, sums.biases + place);
        Start start = AT_ZERO;
        for (ptrdiff_t task = direction; task < tasks; task += D)
            for (ptrdiff_t number = 0; number < counts_[task]; ++number) {
                const Slice& slice = slices_[task * most_slices_ + number];
                multiply(slice, part, sums, start, columns);
                start = AT_C;
                for (ptrdiff_t k = 0; has_bias && k < slice.rows; ++k)
                    add(part.count, slice.deltas + k * delta_row_size<T>() + place, sums.biases + place);
            }
        if (has_bias) write_biases(direction, part);
    }

    // Adds up the sums of all tasks of a direction. There are as many parts as threads.
    void join(ptrdiff_t direction, ptrdiff_t part) const {
        const Sums total = sums_of(direction);
        for (ptrdiff_t task = direction + D; task < tasks; task += D) {
            const Sums more = sums_of(task);
            const auto add_part = [&](ptrdiff_t count, const T* from, T* to) {
                const ptrdiff_t first = count * part / layer.threads, stop = count * (part + 1) / layer.threads;
                add(stop - first, from + first, to + first);
            };
            add_part(GH * I, more.w_ih, total.w_ih);
            add_part(GH * P, more.w_hh, total.w_hh);
            if (projects) add_part(P * H, more.w_hr, total.w_hr);
            if (part == 0) add(row_size, more.biases, total.biases);
        }
        for (ptrdiff_t block = 0; part == 0 && block < cell.block_count; ++block)
            write_biases(direction, {block, 0, H});
    }

    void write_biases(ptrdiff_t direction, const Part& part) const {
        const Weights& results = results_[direction];
        if (!results.b_ih.data) return;
        const auto [in_w_ih, in_w_hh] = cell.blocks[part.block];
        const T* from = sums_of(direction).biases + part.block * H + part.begin;
        if (in_w_ih != NONE) copy(part.count, from, data_of<T>(results.b_ih) + in_w_ih * H + part.begin);
        if (in_w_hh != NONE) copy(part.count, from, data_of<T>(results.b_hh) + in_w_hh * H + part.begin);
    }
};

}  // namespace masked_rnn::LEVEL
LEVEL_END
