// Runs a pass over a stack of layers: plans the rows, checks each pointer's size, and makes each layer's record.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "interface.h"

namespace masked_rnn {

struct Passes {
    Fault (*forward)(const Forward&);
    Fault (*backward)(const Backward&);
};

// The product of sizes; the largest number if it overflows, which no array has.
inline int64_t product(int64_t a, int64_t b) {
    int64_t result;
    return __builtin_mul_overflow(a, b, &result) ? INT64_MAX : result;
}
template <class... More>
int64_t product(int64_t a, int64_t b, More... more) {
    return product(product(a, b), more...);
}
inline int64_t sum(int64_t a, int64_t b) {
    int64_t result;
    return __builtin_add_overflow(a, b, &result) ? INT64_MAX : result;
}

// How many sequences have a step, and how many steps there are. `fault` is the first sequence whose length is not from 0
// to T, `unsorted` the first one that is longer than the one before; -1: none.
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

// Which rows run at which step: step 0 of every sequence that has one, longest first, then step 1, ...
// `_plan.py` makes the same tables in Python.
struct Plan {
    std::vector<int64_t> sizes, starts, order;

    Plan(const int64_t* lengths, const Counts& counts, int64_t batch, int64_t steps) {
        int64_t last = steps;
        if (lengths) {
            last = 0;
            for (int64_t n = 0; n < batch; ++n) last = lengths[n] > last ? lengths[n] : last;
        }
        sizes.assign(size_t(last) + 1, 0);
        starts.assign(size_t(last) + 1, 0);
        if (lengths) {
            for (int64_t n = 0; n < batch; ++n)
                if (lengths[n]) ++sizes[lengths[n] - 1];
            for (int64_t t = last - 1; t > 0; --t) sizes[t - 1] += sizes[t];
        } else {
            for (int64_t t = 0; t < last; ++t) sizes[t] = batch;
        }
        for (int64_t t = 0; t < last; ++t) starts[t + 1] = starts[t] + sizes[t];
        if (counts.unsorted < 0) return;
        order.resize(size_t(counts.sequences));
        std::vector<int64_t> next(sizes.begin() + 1, sizes.end());  // the next place for each length, longest first
        for (int64_t n = 0; n < batch; ++n)
            if (lengths[n]) order[next[lengths[n] - 1]++] = n;
    }
};

// Memory that is not initialized.
class Bytes {
  public:
    Bytes() = default;
    ~Bytes() { free(bytes_); }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;

    void resize(size_t size) {
        if (size <= size_) return;
        free(bytes_);
        size_ = 0;
        bytes_ = static_cast<char*>(malloc(size));
        if (!bytes_) throw std::bad_alloc();
        size_ = size;
    }
    char* get() const { return bytes_; }

  private:
    char* bytes_ = nullptr;
    size_t size_ = 0;
};

// The places of a layer's saved tensors in `Run::saved`, in numbers: history, cells, buffer, and for two directions the
// output, which the next layer reads. With one direction that is the history without its first rows.
struct Saved {
    int64_t history, cells, buffer, output, end;

    Saved(const Run& run, int64_t layer) {
        const CellSizes cell = sizes_of(run.cell);
        const int64_t D = run.directions, states = product(D, sum(run.sequences, run.rows));
        history = 0;
        cells = sum(history, product(states, run.fed_back));
        buffer = sum(cells, cell.has_c ? product(states, run.hidden) : 0);
        output = sum(buffer, cell.saves_buffer ? product(D, run.rows, cell.width, run.hidden) : 0);
        end = sum(output, D == 2 && layer + 1 < run.layers ? product(D, run.rows, run.fed_back) : 0);
    }
};

class Stack {
  public:
    // Checks all sizes, and plans the rows. `fault` says what does not fit.
    explicit Stack(const Run& run) : run_(run) { fault = check(); }
    Fault fault;

    Fault forward(const Passes& passes) {
        if (fault) return fault;
        if (!run_.h_last.data) return "states";
        if (!run_.output.data) return "output";
        fill_last_states();
        const int64_t D = run_.directions, P = run_.fed_back;
        Bytes between[2];
        Array x = run_.x;
        char* saved = static_cast<char*>(run_.saved.data);
        for (int64_t k = 0; k < run_.layers; ++k) {
            Forward pass{};
            pass.layer = layer(k, x);
            pass.h = states(run_.h_last, run_.last_is_flat, k, P);
            pass.c = states(run_.c_last, run_.last_is_flat, k, run_.hidden);
            pass.output_row = D * P;
            const Saved places(run_, k);
            if (saved) set_saved(pass.layer, saved, places);
            const bool is_top = k + 1 == run_.layers;
            if (is_top) {
                pass.output = run_.output;
            } else if (saved) {
                pass.output = output_of(saved, places);
            } else {
                between[k % 2].resize(bytes(run_.rows * D * P));
                pass.output = {between[k % 2].get(), run_.rows * D * P};
            }
            if (!is_top) pass.layer.output_is_padded = 0;
            if (const Fault fault = passes.forward(pass)) return fault;
            if (saved) saved += bytes(places.end);
            x = pass.output;
        }
        return nullptr;
    }

    Fault backward(const Passes& passes) {
        if (fault) return fault;
        if (!run_.saved.data) return "saved tensors";
        const int64_t L = run_.layers, D = run_.directions, P = run_.fed_back;
        const int64_t between = run_.rows * D * P;
        Bytes dh, dc, d_between[2], dx_other;
        Array dh_first = run_.dh_first, dc_first = run_.dc_first;
        if (!dh_first.data) dh.resize(bytes(run_.batch * L * D * P)), dh_first = {dh.get(), run_.batch * L * D * P};
        if (has_c() && !dc_first.data)
            dc.resize(bytes(run_.batch * L * D * run_.hidden)), dc_first = {dc.get(), run_.batch * L * D * run_.hidden};
        move_states(run_.dh_last, run_.last_is_flat, dh_first, run_.first_is_flat, P, nullptr);
        if (has_c()) move_states(run_.dc_last, run_.last_is_flat, dc_first, run_.first_is_flat, run_.hidden, nullptr);
        std::vector<char*> saved;
        char* at = static_cast<char*>(run_.saved.data);
        for (int64_t k = 0; k < L; ++k) saved.push_back(at), at += bytes(Saved(run_, k).end);
        Array d_output = run_.d_output;
        for (int64_t k = L; k-- > 0;) {
            const Saved places(run_, k);
            Backward pass{};
            pass.layer = layer(k, k ? output_of(saved[k - 1], Saved(run_, k - 1)) : run_.x);
            set_saved(pass.layer, saved[k], places);
            if (k + 1 < L) pass.layer.output_is_padded = 0;
            pass.d_output = d_output;
            pass.d_output_row = D * P;
            pass.dh = states(dh_first, run_.first_is_flat, k, P);
            pass.dc = states(dc_first, run_.first_is_flat, k, run_.hidden);
            if (k) {
                d_between[k % 2].resize(bytes(between));
                pass.dx = {d_between[k % 2].get(), between};
            } else {
                pass.dx = run_.dx;
            }
            if (D == 2 && pass.dx.data) {
                dx_other.resize(bytes(pass.dx.size));
                pass.dx_of_backward = {dx_other.get(), pass.dx.size};
            }
            if (run_.gradients.data)
                for (int64_t d = 0; d < D; ++d) pass.gradients[d] = weights_of(run_.gradients, k * D + d);
            if (const Fault fault = passes.backward(pass)) return fault;
            d_output = pass.dx;
        }
        if (run_.dropped.data) clear_dropped(dh_first, P);
        if (run_.dropped.data && has_c()) clear_dropped(dc_first, run_.hidden);
        return nullptr;
    }

  private:
    const Run& run_;
    std::vector<int64_t> sizes_, starts_, order_;
    Array tables_[4];  // sizes, starts, order, lengths
    int64_t steps_ = 0;

    bool has_c() const { return sizes_of(run_.cell).has_c; }
    size_t bytes(int64_t numbers) const { return size_t(numbers) * size_t(run_.item_bytes); }
    static bool holds(const Array& array, int64_t size) { return array.data && size >= 0 && array.size >= size; }
    static bool fits(const Array& array, int64_t size) { return !array.data || holds(array, size); }
    int64_t weights_of_one() const { return 2 + (run_.has_biases ? 2 : 0) + (run_.projects ? 1 : 0); }

    Fault check() {
        const Run& r = run_;
        const int64_t D = r.directions, L = r.layers, P = r.fed_back, H = r.hidden;
        const auto is_flag = [](int64_t number) { return number == 0 || number == 1; };
        if (r.cell < GRU || r.cell > RNN_RELU || (r.item_bytes != 4 && r.item_bytes != 8) || (D != 1 && D != 2) || L < 1 ||
            r.inputs < 0 || H < 1 || P < 1 || r.batch < 1 || r.steps < 1 || r.threads < 1 || r.threads > 1 << 20 ||
            !is_flag(r.has_biases) || !is_flag(r.projects) || !is_flag(r.batch_first) || !is_flag(r.input_is_padded) ||
            !is_flag(r.output_is_padded) || !is_flag(r.first_is_flat) || !is_flag(r.last_is_flat))
            return "sizes";
        if (r.projects ? r.cell != LSTM || P > H : P != H) return "sizes";
        if (const Fault fault = r.starts.data ? check_tables() : plan_lengths()) return fault;
        const int64_t out = r.output_is_padded ? r.padded_rows : r.rows;
        if (!holds(r.x, product(r.input_is_padded ? r.padded_rows : r.rows, r.inputs))) return "input";
        if (!fits(r.output, product(out, D, P))) return "output";
        if (!fits(r.d_output, product(out, D, P))) return "gradients";
        if (!fits(r.dx, product(r.input_is_padded ? r.padded_rows : r.rows, r.inputs))) return "gradients";
        const int64_t h = product(L, D, r.batch, P), c = product(L, D, r.batch, H);
        for (const Array* array : {&r.h_first, &r.h_last, &r.dh_last, &r.dh_first})
            if (!fits(*array, h)) return "states";
        for (const Array* array : {&r.c_first, &r.c_last, &r.dc_last, &r.dc_first})
            if (!fits(*array, has_c() ? c : 0)) return "states";
        if (has_c() && ((r.h_last.data && !r.c_last.data) || !r.h_first.data != !r.c_first.data)) return "states";
        if (!fits(r.dropped, r.batch)) return "dropped states";
        int64_t saved = 0;
        for (int64_t k = 0; k < L; ++k) saved = sum(saved, Saved(r, k).end);
        if (!fits(r.saved, saved)) return "saved tensors";
        if (const Fault fault = check_weights(r.weights, "weights")) return fault;
        return r.gradients.data ? check_weights(r.gradients, "gradients") : nullptr;
    }

    Fault check_weights(const Array& table, Fault fault) const {
        const int64_t D = run_.directions, P = run_.fed_back, H = run_.hidden, rows = sizes_of(run_.cell).gates * H;
        if (!holds(table, product(run_.layers, D, weights_of_one()))) return fault;
        for (int64_t k = 0; k < run_.layers * D; ++k) {
            const Weights w = weights_of(table, k);
            const int64_t inputs = k < D ? run_.inputs : D * P;
            if (!holds(w.w_ih, product(rows, inputs)) || !holds(w.w_hh, product(rows, P))) return fault;
            if (run_.has_biases && (!holds(w.b_ih, rows) || !holds(w.b_hh, rows))) return fault;
            if (run_.projects && !holds(w.w_hr, product(P, H))) return fault;
        }
        return nullptr;
    }

    Fault check_tables() {
        const Run& r = run_;
        if (r.rows < 1 || r.sequences < 1 || r.sequences > r.batch || r.padded_rows < 0 || r.lengths.data) return "sizes";
        if (!holds(r.sizes, sum(r.steps, 1)) || !holds(r.starts, sum(r.steps, 1))) return "steps";
        const auto* sizes = static_cast<const int64_t*>(r.sizes.data);
        const auto* starts = static_cast<const int64_t*>(r.starts.data);
        if (sizes[0] != r.sequences || sizes[r.steps] != 0 || starts[0] != 0 || starts[r.steps] != r.rows) return "steps";
        for (int64_t t = 0; t < r.steps; ++t)
            if (sizes[t] < sizes[t + 1] || sizes[t] < 1 || sizes[t] > r.rows || starts[t] > r.rows ||
                starts[t + 1] != starts[t] + sizes[t])
                return "steps";
        if (r.index.data) {
            if (!holds(r.index, r.rows)) return "index";
            const auto* index = static_cast<const int64_t*>(r.index.data);
            for (int64_t k = 0; k < r.rows; ++k)
                if (index[k] < 0 || index[k] >= r.padded_rows) return "index";
        } else if (r.input_is_padded || r.output_is_padded) {
            return "index";
        }
        if (r.order.data) {
            if (!holds(r.order, r.sequences)) return "order";
            const auto* order = static_cast<const int64_t*>(r.order.data);
            for (int64_t k = 0; k < r.sequences; ++k)
                if (order[k] < 0 || order[k] >= r.batch) return "order";
        }
        steps_ = r.steps;
        tables_[0] = r.sizes, tables_[1] = r.starts, tables_[2] = r.order, tables_[3] = {nullptr, 0};
        return nullptr;
    }

    Fault plan_lengths() {
        const Run& r = run_;
        if (r.index.data || r.order.data || r.sizes.data) return "steps";
        if (!fits(r.lengths, r.batch)) return "lengths";
        const auto* lengths = static_cast<const int64_t*>(r.lengths.data);
        Counts counts{r.batch, product(r.batch, r.steps)};
        if (lengths) counts = count_lengths(lengths, r.batch, r.steps);
        if (counts.fault >= 0) return "lengths";
        if (counts.rows < 1 || counts.rows == INT64_MAX || counts.rows != r.rows || counts.sequences != r.sequences ||
            r.padded_rows != product(r.batch, r.steps))
            return "sizes";
        Plan plan(lengths, counts, r.batch, r.steps);
        sizes_.swap(plan.sizes), starts_.swap(plan.starts), order_.swap(plan.order);
        steps_ = int64_t(sizes_.size()) - 1;
        tables_[0] = {sizes_.data(), steps_ + 1}, tables_[1] = {starts_.data(), steps_ + 1};
        tables_[2] = {order_.empty() ? nullptr : order_.data(), int64_t(order_.size())};
        tables_[3] = r.lengths;
        return nullptr;
    }

    Weights weights_of(const Array& table, int64_t k) const {
        const Array* w = static_cast<const Array*>(table.data) + k * weights_of_one();
        Weights weights{w[0], w[1], {nullptr, 0}, {nullptr, 0}, {nullptr, 0}};
        if (run_.has_biases) weights.b_ih = w[2], weights.b_hh = w[3];
        if (run_.projects) weights.w_hr = w[weights_of_one() - 1];
        return weights;
    }

    Layer layer(int64_t k, const Array& x) const {
        const Run& r = run_;
        Layer layer{};
        layer.cell = r.cell, layer.item_bytes = r.item_bytes, layer.directions = r.directions;
        layer.batch = r.batch, layer.sequences = r.sequences, layer.steps = steps_, layer.rows = r.rows;
        layer.inputs = k ? r.directions * r.fed_back : r.inputs;
        layer.hidden = r.hidden, layer.fed_back = r.fed_back;
        layer.threads = r.threads, layer.parallel = r.parallel;
        layer.input_is_padded = k ? 0 : r.input_is_padded, layer.output_is_padded = r.output_is_padded;
        layer.sequence_stride = r.batch_first ? r.steps : 1, layer.step_stride = r.batch_first ? 1 : r.batch;
        layer.sizes = tables_[0], layer.starts = tables_[1], layer.order = tables_[2], layer.lengths = tables_[3];
        layer.index = r.index;
        layer.x = x, layer.x_row = layer.inputs;
        for (int64_t d = 0; d < r.directions; ++d) layer.weights[d] = weights_of(r.weights, k * r.directions + d);
        return layer;
    }

    void set_saved(Layer& layer, char* at, const Saved& places) const {
        layer.history = {at + bytes(places.history), places.cells - places.history};
        if (has_c()) layer.cells = {at + bytes(places.cells), places.buffer - places.cells};
        if (sizes_of(run_.cell).saves_buffer) layer.buffer = {at + bytes(places.buffer), places.output - places.buffer};
    }

    // The output of a layer below the top, among its saved tensors.
    Array output_of(char* at, const Saved& places) const {
        const int64_t first = run_.directions == 2 ? places.output : places.history + run_.sequences * run_.fed_back;
        return {at + bytes(first), run_.rows * run_.directions * run_.fed_back};
    }

    // The states of one layer. `width` is P, or H for c.
    States states(const Array& all, int64_t is_flat, int64_t layer, int64_t width) const {
        const int64_t D = run_.directions, direction = is_flat ? width : run_.batch * width;
        return {static_cast<char*>(all.data) + bytes(layer * D * direction), direction, is_flat ? run_.layers * D * width : width};
    }

    char* state(const States& states, int64_t direction, int64_t n) const {
        return static_cast<char*>(states.data) + bytes(direction * states.direction_stride + n * states.sequence_stride);
    }

    void fill_last_states() const {
        move_states(run_.h_first, run_.first_is_flat, run_.h_last, run_.last_is_flat, run_.fed_back, dropped());
        if (has_c()) move_states(run_.c_first, run_.first_is_flat, run_.c_last, run_.last_is_flat, run_.hidden, dropped());
    }

    const unsigned char* dropped() const { return static_cast<const unsigned char*>(run_.dropped.data); }

    // Whether a sequence's state is dropped: it has a reset, and a step.
    bool is_dropped(int64_t direction, int64_t n) const {
        const auto* lengths = static_cast<const int64_t*>(run_.lengths.data);
        return direction == 0 && dropped() && dropped()[n] && (!lengths || lengths[n]);
    }

    // Copies all states, in another layout perhaps. `from` without memory holds zeros.
    void move_states(const Array& from, int64_t from_flat, const Array& to, int64_t to_flat, int64_t width,
                     const unsigned char* dropped) const {
        const int64_t D = run_.directions;
        if (!from.data) {
            memset(to.data, 0, bytes(run_.layers * D * run_.batch * width));
            return;
        }
        if (from_flat == to_flat && !dropped) {
            memcpy(to.data, from.data, bytes(run_.layers * D * run_.batch * width));
            return;
        }
        for (int64_t k = 0; k < run_.layers; ++k) {
            const States source = states(from, from_flat, k, width), target = states(to, to_flat, k, width);
            for (int64_t d = 0; d < D; ++d)
                for (int64_t n = 0; n < run_.batch; ++n) {
                    if (dropped && is_dropped(d, n))
                        memset(state(target, d, n), 0, bytes(width));
                    else
                        memcpy(state(target, d, n), state(source, d, n), bytes(width));
                }
        }
    }

    // What a dropped state was has no effect, so its gradient is zero.
    void clear_dropped(const Array& gradients, int64_t width) const {
        for (int64_t k = 0; k < run_.layers; ++k) {
            const States own = states(gradients, run_.first_is_flat, k, width);
            for (int64_t n = 0; n < run_.batch; ++n)
                if (is_dropped(0, n)) memset(state(own, 0, n), 0, bytes(width));
        }
    }
};

}  // namespace masked_rnn
