// A layer's weights, ready for the products of one pass.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "basics.h"
#include "cell_table.h"
#include "gemm.h"
#include "in_place.h"
#include "layer.h"
#include "level.h"
#include "memory.h"
#include "panels.h"
#include "tile.h"
#include "vec.h"

LEVEL_BEGIN
namespace masked_rnn::LEVEL {

// Whether so many products of one or two rows with a weight, whose rows are `columns` numbers, are faster where it
// lies. That saves packing it, which takes a time in proportion to its columns. But each product takes longer, by as
// much time as packing LANES + 8 of them: a measured number.
template <class T>
bool stays_in_place(ptrdiff_t columns, ptrdiff_t products) {
    return products <= max(1, columns / (LANES<T> + 8));
}

// A weight, packed or where it lies, with its rows in the order of the activations. Forward multiplies by its
// transpose, backward by itself.
template <class T, bool TRANSPOSED>
class Weight {
  public:
    void take(const Array& array, ptrdiff_t columns, const RowOrder& order, ptrdiff_t products, Memory& memory) {
        data_ = data_of<const T>(array), order_ = order, rows_ = order.rows(), columns_ = columns;
        is_packed_ = !stays_in_place<T>(columns, products) || (TRANSPOSED && rows_ < SUMS<T>);
        const ptrdiff_t depth = TRANSPOSED ? columns : rows_, width = TRANSPOSED ? rows_ : columns;
        panels_ = {memory.take<T>(is_packed_ ? Panels<T>::size(depth, width) : 0), depth, width};
    }

    // 0: it stays in place.
    ptrdiff_t panels_to_pack() const { return is_packed_ ? divide_up(panels_.columns, TILE_WIDTH<T>) : 0; }

    void pack(ptrdiff_t panel) const {
        if (panel >= panels_to_pack()) return;
        if constexpr (TRANSPOSED)
            pack_transposed(data_, order_, panels_, panel);
        else
            pack_straight(data_, order_, panels_, panel);
    }

    // C = start + A Wᵀ, or start + A W, for at most MOST_ADDRESSES rows. `row` is there if C starts from a row.
    void multiply(const T* const* a, Start start, const T* row, T* const* c, ptrdiff_t count) const {
        if (is_packed_) return multiply_packed(a, panels_, start, row, c, count);
        ptrdiff_t place = 0;
        for (const RowRun& run : order_) {
            const SomeRows<T> rows{data_, rows_, columns_, run.first, run.first + run.count};
            if constexpr (TRANSPOSED)
                multiply_transposed(a, rows, start, row, c, place, count);
            else
                multiply_straight(a, place, rows, place ? AT_C : start, c, count);
            place += run.count;
        }
    }

  private:
    const T* data_ = nullptr;
    ptrdiff_t rows_ = 0, columns_ = 0;
    RowOrder order_;
    bool is_packed_ = false;
    Panels<T> panels_ = {};
};

// All weights of a layer, of each direction.
template <class T, bool TRANSPOSED>
struct LayerWeights {
    Weight<T, TRANSPOSED> w_ih[2], w_hh[2], w_hr[2];

    void take(const Layer& layer, const CellTable& cell, bool wants_w_ih, bool wants_w_hh, Memory& memory) {
        // Products of one or two rows: of W_ih with all rows at once, of the others with those of each step.
        const ptrdiff_t at_once = divide_up(layer.rows, 2);
        ptrdiff_t in_steps = 0;
        for (ptrdiff_t t = 0; t < layer.steps; ++t) in_steps += divide_up(data_of<const int64_t>(layer.sizes)[t], 2);
        const ptrdiff_t H = layer.hidden, P = layer.fed_back;
        for (ptrdiff_t d = 0; d < layer.directions; ++d) {
            const Weights& w = layer.weights[d];
            if (wants_w_ih) w_ih[d].take(w.w_ih, layer.inputs, RowOrder(cell, &GateBlock::in_w_ih, H), at_once, memory);
            if (wants_w_hh) w_hh[d].take(w.w_hh, P, RowOrder(cell, &GateBlock::in_w_hh, H), in_steps, memory);
            if (w.w_hr.data) w_hr[d].take(w.w_hr, H, RowOrder(P), in_steps, memory);
        }
    }

    ptrdiff_t panels_to_pack() const {
        return max(w_ih[0].panels_to_pack(), max(w_hh[0].panels_to_pack(), w_hr[0].panels_to_pack()));
    }
    void pack(ptrdiff_t direction, ptrdiff_t panel) const {
        w_ih[direction].pack(panel);
        w_hh[direction].pack(panel);
        w_hr[direction].pack(panel);
    }
};

}  // namespace masked_rnn::LEVEL
LEVEL_END
