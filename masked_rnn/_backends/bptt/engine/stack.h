// A pass over a stack of layers: makes each layer's record of the one that Python filled, and runs the loops on it.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <new>
#include <vector>

#include "cell_table.h"
#include "check.h"
#include "interface.h"
#include "layer.h"
#include "plan.h"
#include "sizes.h"

namespace masked_rnn {

// Memory that is not initialized.
class Bytes {
  public:
    Bytes() = default;
    ~Bytes() { free(bytes_); }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;

    void* resize(size_t size) {
        if (size > size_) {
            free(bytes_);
            size_ = 0;
            bytes_ = malloc(size);
            if (!bytes_) throw std::bad_alloc();
            size_ = size;
        }
        return bytes_;
    }

  private:
    void* bytes_ = nullptr;
    size_t size_ = 0;
};

class Stack {
  public:
    Stack(const Run& run, const Loops& loops) : run_(run), loops_(loops), cell_(loops.table_of(run.cell)) {}

    // Checks the record, and plans the rows.
    Fault check() {
        if (const Fault fault = check_numbers(run_)) return fault;
        if (const Fault fault = plan_.find(run_)) return fault;
        if (const Fault fault = check_arrays(run_, cell_)) return fault;
        char* at = data_of<char>(run_.saved);
        for (int64_t k = 0; at && k < run_.layers; at += bytes(Saved(run_, cell_, k++).end)) saved_.push_back(at);
        return nullptr;
    }

    Fault forward() const {
        if (!run_.h_last.data) return "states";
        if (!run_.output.data) return "output";
        move_states(run_.h_first, run_.first_is_flat, run_.h_last, run_.last_is_flat, run_.fed_back, run_.dropped);
        if (cell_.has_c)
            move_states(run_.c_first, run_.first_is_flat, run_.c_last, run_.last_is_flat, run_.hidden, run_.dropped);
        const int64_t width = run_.directions * run_.fed_back;
        Bytes between[2];
        Array x = run_.x;
        for (int64_t k = 0; k < run_.layers; ++k) {
            Forward record{};
            record.layer = layer(k, x);
            record.h = states(run_.h_last, run_.last_is_flat, k, run_.fed_back);
            record.c = states(run_.c_last, run_.last_is_flat, k, run_.hidden);
            if (k + 1 == run_.layers)
                record.output = run_.output;
            else if (run_.saved.data)
                record.output = output_of(k);
            else
                record.output = make(between[k % 2], run_.rows * width);
            if (const Fault fault = loops_.forward(record)) return fault;
            x = record.output;
        }
        return nullptr;
    }

    Fault backward() const {
        if (!run_.saved.data) return "saved tensors";
        const int64_t L = run_.layers, D = run_.directions, P = run_.fed_back, H = run_.hidden;
        Bytes dh, dc, d_between[2], dx_reverse;
        // The gradients of the last states become those of the initial ones, if these are wanted.
        Array dh_first = run_.dh_first.data ? run_.dh_first : make(dh, run_.batch * L * D * P);
        move_states(run_.dh_last, run_.last_is_flat, dh_first, run_.first_is_flat, P, {});
        Array dc_first{};
        if (cell_.has_c) {
            dc_first = run_.dc_first.data ? run_.dc_first : make(dc, run_.batch * L * D * H);
            move_states(run_.dc_last, run_.last_is_flat, dc_first, run_.first_is_flat, H, {});
        }
        Array d_output = run_.d_output;
        for (int64_t k = L; k-- > 0;) {
            Backward record{};
            record.layer = layer(k, k ? output_of(k - 1) : run_.x);
            record.d_output = d_output;
            record.wants_first = run_.dh_first.data || run_.dc_first.data;
            record.dh = states(dh_first, run_.first_is_flat, k, P);
            record.dc = states(dc_first, run_.first_is_flat, k, H);
            record.dx = k ? make(d_between[k % 2], run_.rows * D * P) : run_.dx;
            if (D == 2 && record.dx.data) record.dx_reverse = make(dx_reverse, record.dx.size);
            for (int64_t d = 0; run_.gradients.data && d < D; ++d)
                record.gradients[d] = weights_of(run_, run_.gradients, k, d);
            if (const Fault fault = loops_.backward(record)) return fault;
            d_output = record.dx;
        }
        // What a dropped state was has no effect, so its gradient is zero.
        clear_dropped(dh_first, P);
        if (cell_.has_c) clear_dropped(dc_first, H);
        return nullptr;
    }

  private:
    const Run& run_;
    const Loops& loops_;
    const CellTable cell_;
    Plan plan_;
    std::vector<char*> saved_;  // the memory of each layer's saved tensors

    size_t bytes(int64_t numbers) const { return size_t(numbers) * size_t(run_.item_bytes); }
    Array make(Bytes& memory, int64_t numbers) const { return {memory.resize(bytes(numbers)), numbers}; }

    Layer layer(int64_t k, const Array& x) const {
        const Run& r = run_;
        Layer layer{};
        layer.cell = r.cell, layer.item_bytes = r.item_bytes, layer.directions = r.directions;
        layer.batch = r.batch, layer.sequences = r.sequences, layer.steps = plan_.steps, layer.rows = r.rows;
        layer.inputs = k ? r.directions * r.fed_back : r.inputs;
        layer.hidden = r.hidden, layer.fed_back = r.fed_back;
        layer.threads = r.threads, layer.parallel = r.parallel;
        layer.input_is_padded = k ? 0 : r.input_is_padded;
        layer.output_is_padded = k + 1 < r.layers ? 0 : r.output_is_padded;
        layer.sequence_stride = r.batch_first ? r.steps : 1, layer.step_stride = r.batch_first ? 1 : r.batch;
        layer.sizes = plan_.sizes, layer.starts = plan_.starts, layer.index = plan_.index;
        layer.order = plan_.order, layer.lengths = plan_.lengths;
        layer.x = x;
        for (int64_t d = 0; d < r.directions; ++d) layer.weights[d] = weights_of(r, r.weights, k, d);
        if (saved_.empty()) return layer;
        const Saved places(r, cell_, k);
        const auto array = [&](int64_t begin, int64_t end) -> Array {
            return {saved_[size_t(k)] + bytes(begin), end - begin};
        };
        layer.h_history = array(places.h_history, places.c_history);
        if (cell_.has_c) layer.c_history = array(places.c_history, places.activations);
        if (cell_.saves_activations) layer.activations = array(places.activations, places.output);
        return layer;
    }

    // The output of a layer below the top, among its saved tensors.
    Array output_of(int64_t layer) const {
        const Saved places(run_, cell_, layer);
        const int64_t begin = run_.directions == 2 ? places.output : places.h_history + run_.sequences * run_.fed_back;
        return {saved_[size_t(layer)] + bytes(begin), run_.rows * run_.directions * run_.fed_back};
    }

    // The states of one layer. `width` is P, or H for c.
    States states(const Array& all, int64_t is_flat, int64_t layer, int64_t width) const {
        const int64_t D = run_.directions, direction = is_flat ? width : run_.batch * width;
        char* begin = data_of<char>(all);
        return {begin ? begin + bytes(layer * D * direction) : nullptr, direction,
                is_flat ? run_.layers * D * width : width};
    }

    char* state(const States& states, int64_t direction, int64_t n) const {
        return static_cast<char*>(states.data) +
               bytes(direction * states.direction_stride + n * states.sequence_stride);
    }

    // Whether a sequence's state is dropped: it has a reset, and a step. The second direction starts at the end.
    bool is_dropped(const Array& dropped, int64_t direction, int64_t n) const {
        const auto* lengths = data_of<const int64_t>(run_.lengths);
        return dropped.data && direction == 0 && data_of<const char>(dropped)[n] && (!lengths || lengths[n]);
    }

    // Copies all states, in another layout perhaps. `from` without memory holds zeros, and so does what is dropped.
    void move_states(const Array& from, int64_t from_flat, const Array& to, int64_t to_flat, int64_t width,
                     const Array& dropped) const {
        const int64_t L = run_.layers, D = run_.directions, count = L * D * run_.batch * width;
        if (!from.data) {
            memset(to.data, 0, bytes(count));
        } else if (from_flat == to_flat && !dropped.data) {
            memcpy(to.data, from.data, bytes(count));
        } else {
            for (int64_t k = 0; k < L; ++k) {
                const States source = states(from, from_flat, k, width), target = states(to, to_flat, k, width);
                for (int64_t d = 0; d < D; ++d)
                    for (int64_t n = 0; n < run_.batch; ++n) {
                        if (is_dropped(dropped, d, n))
                            memset(state(target, d, n), 0, bytes(width));
                        else
                            memcpy(state(target, d, n), state(source, d, n), bytes(width));
                    }
            }
        }
    }

    void clear_dropped(const Array& gradients, int64_t width) const {
        if (!run_.dropped.data) return;
        for (int64_t k = 0; k < run_.layers; ++k) {
            const States layer = states(gradients, run_.first_is_flat, k, width);
            for (int64_t n = 0; n < run_.batch; ++n)
                if (is_dropped(run_.dropped, 0, n)) memset(state(layer, 0, n), 0, bytes(width));
        }
    }
};

}  // namespace masked_rnn
