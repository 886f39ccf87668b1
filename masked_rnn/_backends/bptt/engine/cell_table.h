// What a row of a cell's activations holds, and the order in which it has the rows of the weights.
#pragma once

#include <stddef.h>

namespace masked_rnn {

constexpr ptrdiff_t NONE = -1;

// H numbers of a row of activations: before a step, the sum of a gate's products and biases. The place of the gate in
// each weight, whose rows it has from place * H on. NONE: this weight's product is not a part of the sum.
struct GateBlock {
    ptrdiff_t in_w_ih, in_w_hh;
};

// What is known of a cell. `cells.h` has the tables.
struct CellTable {
    ptrdiff_t block_count;  // the number of blocks in a row of activations
    GateBlock blocks[4];    // those of W_hh come first, those of W_ih last
    bool has_c;
    bool saves_activations;  // else backward needs the states alone
    bool keeps_dh;           // whether h before a step has a share of the gradient that no product brings

    constexpr ptrdiff_t gates() const {
        ptrdiff_t count = 0;
        for (ptrdiff_t block = 0; block < block_count; ++block) count += blocks[block].in_w_ih != NONE;
        return count;
    }
};

// Rows of a weight that lie next to each other.
struct RowRun {
    ptrdiff_t first, count;
};

// The rows of a weight in the order in which a row of activations has them.
class RowOrder {
  public:
    RowOrder() = default;

    // All rows, as they lie.
    explicit RowOrder(ptrdiff_t rows) : runs_{{0, rows}}, count_(1) {}

    // Those of the blocks. `place` is GateBlock::in_w_ih or GateBlock::in_w_hh.
    RowOrder(const CellTable& cell, ptrdiff_t GateBlock::* place, ptrdiff_t H) {
        ptrdiff_t next = NONE;  // the row after the last run
        for (ptrdiff_t block = 0; block < cell.block_count; ++block) {
            if (cell.blocks[block].*place == NONE) continue;
            const ptrdiff_t first = cell.blocks[block].*place * H;
            if (first == next)
                runs_[count_ - 1].count += H;
            else
                runs_[count_++] = {first, H};
            next = first + H;
        }
    }

    const RowRun* begin() const { return runs_; }
    const RowRun* end() const { return runs_ + count_; }

    ptrdiff_t rows() const {
        ptrdiff_t count = 0;
        for (const RowRun& run : *this) count += run.count;
        return count;
    }

    // The weight's row at a place in this order.
    ptrdiff_t row(ptrdiff_t place) const {
        const RowRun* run = runs_;
        for (; place >= run->count; ++run) place -= run->count;
        return run->first + place;
    }

  private:
    RowRun runs_[4] = {};
    ptrdiff_t count_ = 0;
};

}  // namespace masked_rnn
