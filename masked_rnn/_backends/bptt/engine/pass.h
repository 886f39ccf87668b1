// What the two passes share: a layer's sizes, the split of its work, and scratch memory.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "basics.h"
#include "cell_table.h"
#include "cells.h"
#include "layer.h"
#include "layout.h"
#include "level.h"
#include "memory.h"
#include "threads.h"

LEVEL_BEGIN
namespace masked_rnn::LEVEL {

// The sizes of a layer, and the split of its work.
struct LayerSizes {
    const Layer& layer;
    CellTable cell;
    WorkSplit split;
    ptrdiff_t D, I, H, P;  // directions, input, hidden, state that is fed back
    ptrdiff_t GH;          // gates times H
    ptrdiff_t row_size;    // the numbers in a row of activations; the last GH of them are those of W_ih
    ptrdiff_t tasks;       // one for each worker and direction
    bool projects;

    explicit LayerSizes(const Layer& layer)
        : layer(layer),
          cell(table_of(layer.cell)),
          split(layer),
          D(layer.directions),
          I(layer.inputs),
          H(layer.hidden),
          P(layer.fed_back),
          GH(cell.gates() * H),
          row_size(cell.block_count * H),
          tasks(D * split.workers),
          projects(layer.weights[0].w_hr.data) {}

    // The numbers in a row of deltas, see layout.h.
    template <class T>
    ptrdiff_t delta_row_size() const {
        return row_size + (projects ? P + H : 0) + ROW_GAP<T>;
    }
};

class Pass : protected LayerSizes {
  protected:
    using LayerSizes::LayerSizes;

    Memory memory_;

    // Packs the weights, and meanwhile does `more` other tasks.
    template <class PackedWeights, class Task>
    void pack(const PackedWeights& weights, ptrdiff_t more, const Task& do_more) const {
        const ptrdiff_t panels = D * weights.panels_to_pack();
        run_tasks(layer, panels + more, [&](ptrdiff_t k) {
            if (k < panels)
                weights.pack(k % D, k / D);
            else
                do_more(k - panels);
        });
    }

    // Calls a function with each block of a task.
    template <class RunBlock>
    void run_blocks(ptrdiff_t task, const RunBlock& run_block) const {
        const ptrdiff_t worker = task / D;
        for (ptrdiff_t first = worker; first < layer.sequences; first += split.workers * split.block_size)
            run_block(SequenceBlock{layer, task % D, first, split.workers, split.block_size});
    }

    // Zeros the rows of a matrix in the padded layout at which no sequence has a step. `is_there` is scratch memory,
    // one byte for each row, which is used if the layer has an index.
    template <class T>
    void clear_padding(T* matrix, ptrdiff_t rows, ptrdiff_t columns, unsigned char* is_there) const {
        if (rows <= layer.rows) return;
        if (const int64_t* index = data_of<const int64_t>(layer.index)) {
            for (ptrdiff_t k = 0; k < rows; ++k) is_there[k] = 0;
            for (ptrdiff_t k = 0; k < layer.rows; ++k) is_there[index[k]] = 1;
            for (ptrdiff_t k = 0; k < rows; ++k)
                if (!is_there[k]) fill(columns, matrix + k * columns);
            return;
        }
        const int64_t* lengths = data_of<const int64_t>(layer.lengths);
        const ptrdiff_t steps = rows / layer.batch;
        for (ptrdiff_t n = 0; n < layer.batch; ++n)
            for (ptrdiff_t t = lengths[n]; t < steps; ++t)
                fill(columns, matrix + (n * layer.sequence_stride + t * layer.step_stride) * columns);
    }
};

}  // namespace masked_rnn::LEVEL
LEVEL_END
