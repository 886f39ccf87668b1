// Which rows run at which step: step 0 of every sequence that has one, longest first, then step 1, ...
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "interface.h"
#include "sizes.h"

namespace masked_rnn {

// How many sequences have a step, and how many steps there are. `fault` is the first sequence whose length is not from
// 0 to T, `unsorted` the first one that is longer than the one before; -1: none.
struct Counts {
    int64_t sequences = 0, rows = 0, fault = -1, unsorted = -1;
};

inline Counts count_lengths(const int64_t* lengths, int64_t batch, int64_t steps) {
    Counts counts;
    for (int64_t n = 0; n < batch; ++n) {
        const int64_t length = lengths[n];
        if (length < 0 || length > steps) {
            counts.fault = n;
            return counts;
        }
        if (n && length > lengths[n - 1] && counts.unsorted < 0) counts.unsorted = n;
        counts.sequences += length > 0;
        counts.rows = sum(counts.rows, length);
    }
    return counts;
}

// The tables of a plan (see Run): those of the record, checked, or made of its lengths, as `_plan.py` makes them.
class Plan {
  public:
    int64_t steps = 0;
    Array sizes{}, starts{}, index{}, order{}, lengths{};

    // Finds the tables. Returns what is wrong with the record.
    Fault find(const Run& run) { return run.starts.data ? take_tables(run) : plan_lengths(run); }

  private:
    std::vector<int64_t> sizes_, starts_, order_;

    Fault take_tables(const Run& run) {
        if (run.rows < 1 || run.sequences < 1 || run.sequences > run.batch || run.padded_rows < 0 || run.lengths.data)
            return "sizes";
        if (!holds(run.sizes, sum(run.steps, 1)) || !holds(run.starts, sum(run.steps, 1))) return "steps";
        const auto *size = data_of<const int64_t>(run.sizes), *start = data_of<const int64_t>(run.starts);
        if (size[0] != run.sequences || size[run.steps] != 0 || start[0] != 0 || start[run.steps] != run.rows)
            return "steps";
        for (int64_t t = 0; t < run.steps; ++t)
            if (size[t] < size[t + 1] || size[t] < 1 || size[t] > run.rows || start[t] > run.rows ||
                start[t + 1] != start[t] + size[t])
                return "steps";
        if (!run.index.data && (run.input_is_padded || run.output_is_padded)) return "index";
        if (!fits(run.index, run.rows)) return "index";
        for (int64_t k = 0; run.index.data && k < run.rows; ++k) {
            const int64_t row = data_of<const int64_t>(run.index)[k];
            if (row < 0 || row >= run.padded_rows) return "index";
        }
        if (!fits(run.order, run.sequences)) return "order";
        for (int64_t k = 0; run.order.data && k < run.sequences; ++k) {
            const int64_t sequence = data_of<const int64_t>(run.order)[k];
            if (sequence < 0 || sequence >= run.batch) return "order";
        }
        steps = run.steps, sizes = run.sizes, starts = run.starts, index = run.index, order = run.order;
        return nullptr;
    }

    Fault plan_lengths(const Run& run) {
        if (run.index.data || run.order.data || run.sizes.data) return "steps";
        if (!fits(run.lengths, run.batch)) return "lengths";
        const auto* length = data_of<const int64_t>(run.lengths);
        Counts counts{run.batch, product(run.batch, run.steps)};
        if (length) counts = count_lengths(length, run.batch, run.steps);
        if (counts.fault >= 0) return "lengths";
        if (counts.rows < 1 || counts.rows == INT64_MAX || counts.rows != run.rows ||
            counts.sequences != run.sequences || run.padded_rows != product(run.batch, run.steps))
            return "sizes";
        count_steps(run, length);
        if (counts.unsorted >= 0) sort(run, length, counts.sequences);
        sizes = {sizes_.data(), steps + 1}, starts = {starts_.data(), steps + 1};
        if (!order_.empty()) order = {order_.data(), counts.sequences};
        lengths = run.lengths;
        return nullptr;
    }

    void count_steps(const Run& run, const int64_t* length) {
        steps = length ? 0 : run.steps;
        for (int64_t n = 0; length && n < run.batch; ++n)
            if (length[n] > steps) steps = length[n];
        sizes_.assign(size_t(steps), length ? 0 : run.batch);
        for (int64_t n = 0; length && n < run.batch; ++n)
            if (length[n]) ++sizes_[length[n] - 1];
        for (int64_t t = steps - 1; length && t > 0; --t) sizes_[t - 1] += sizes_[t];
        sizes_.push_back(0);
        starts_.assign(size_t(steps) + 1, 0);
        for (int64_t t = 0; t < steps; ++t) starts_[t + 1] = starts_[t] + sizes_[t];
    }

    void sort(const Run& run, const int64_t* length, int64_t sequences) {
        order_.resize(size_t(sequences));
        std::vector<int64_t> next(sizes_.begin() + 1, sizes_.end());  // the next place for each length, longest first
        for (int64_t n = 0; n < run.batch; ++n)
            if (length[n]) order_[next[length[n] - 1]++] = n;
    }
};

}  // namespace masked_rnn
