// The backward loop through time: computes the states' gradients and the deltas, last step first, and from them the
// gradients of the weights and of the input.
//
// B sequences, R rows that run, I input, H hidden, P state that is fed back, N = gates H.

template <class T>
class BackwardPass {
  public:
    explicit BackwardPass(const Backward& run)
        : run_(run),
          layer_(run.layer),
          sizes_(sizes_of(layer_.cell)),
          steps_(Steps<T>::of(layer_.cell)),
          division_(layer_),
          H_(layer_.hidden),
          P_(layer_.fed_back),
          I_(layer_.inputs),
          N_(sizes_.gates * H_),
          free_((sizes_.width - sizes_.gates) * H_),
          row_(sizes_.width * H_),
          projects_(layer_.weights[0].w_hr.data),
          wants_x_(run.dx.data),
          wants_weights_(run.gradients[0].w_hh.data),
          delta_row_(row_ + (projects_ ? P_ + H_ : 0) + PADDING<T>),
          memory_(bytes()) {}

    Fault operator()() {
        if (!memory_) return NO_MEMORY;
        for (ptrdiff_t d = 0; d < layer_.directions; ++d) {
            if (wants_x_) w_ih_[d] = {memory_.take<T>(Panels<T>::size(N_, I_)), N_, I_};
            w_hh_[d] = {memory_.take<T>(Panels<T>::size(N_, P_)), N_, P_};
            if (projects_) w_hr_[d] = {memory_.take<T>(Panels<T>::size(P_, H_)), P_, H_};
        }
        const ptrdiff_t D = layer_.directions, tasks = D * division_.sides;
        T* scratch = memory_.take<T>(tasks * scratch_size());
        T* sums = memory_.take<T>(tasks * sums_size());
        const ptrdiff_t panels = divide_up(max(I_, max(P_, H_)), TILE_WIDTH<T>);
        auto* is_there = memory_.take<unsigned char>(D * outside_rows());
        run_tasks(layer_, D * panels + (wants_x_ ? D : 0), [&](ptrdiff_t k) {
            if (k < D * panels) return pack(k % D, k / D);
            const ptrdiff_t d = k - D * panels, rows = outside_rows();
            clear_padding(layer_, in<T>(run_.dx) + d * rows * I_, rows, I_, is_there + d * rows);
        });
        run_tasks(layer_, tasks, [&](ptrdiff_t k) {
            const ptrdiff_t d = k % D, side = k / D;
            const Sums own = sums_of(d, side, sums + k * sums_size());
            if (wants_weights_) clear(own);
            for (ptrdiff_t b = side; b < division_.blocks; b += division_.sides)
                run_block(Block{layer_, d, b, division_.blocks}, scratch + k * scratch_size(), own);
        });
        if (wants_weights_)
            run_tasks(layer_, D * layer_.threads, [&](ptrdiff_t k) { join(sums, k % D, k / D, layer_.threads); });
        return NONE;
    }

  private:
    // The memory in which a task sums its part of the weights' gradients.
    struct Sums {
        T *w_ih, *w_hh, *w_hr, *bias;
    };

    const Backward& run_;
    const Layer& layer_;
    CellSizes sizes_;
    Steps<T> steps_;
    Division division_;
    ptrdiff_t H_, P_, I_, N_, free_, row_;
    bool projects_, wants_x_, wants_weights_;
    ptrdiff_t delta_row_;  // deltas; with a projection also the gradient of h, and m; then unused space
    Memory memory_;
    Panels<T> w_ih_[2], w_hh_[2], w_hr_[2];

    static constexpr ptrdiff_t COLUMNS = 96;  // of the deltas, packed at once: they fit the second-level cache
    static_assert(COLUMNS % TILE_ROWS == 0);

    ptrdiff_t panels_size() const {
        return wants_weights_ ? Panels<T>::size(DEPTH, I_) + Panels<T>::size(DEPTH, P_) +
                                    (projects_ ? Panels<T>::size(DEPTH, H_) : 0) + DEPTH * COLUMNS
                              : 0;
    }
    ptrdiff_t scratch_size() const { return DEPTH * delta_row_ + 2 * MOST_ROWS * H_ + panels_size() + 16; }
    ptrdiff_t sums_size() const {
        const ptrdiff_t weights = division_.sides > 1 ? N_ * (I_ + P_) + (projects_ ? P_ * H_ : 0) : 0;
        return wants_weights_ ? weights + row_ : 0;
    }
    size_t bytes() const {
        const size_t weights = Memory::bytes_for<T>(Panels<T>::size(N_, I_)) +
                               Memory::bytes_for<T>(Panels<T>::size(N_, P_)) +
                               Memory::bytes_for<T>(Panels<T>::size(P_, H_));
        const ptrdiff_t tasks = layer_.directions * division_.sides;
        return layer_.directions * weights + Memory::bytes_for<T>(tasks * scratch_size()) +
               Memory::bytes_for<T>(tasks * sums_size()) +
               Memory::bytes_for<unsigned char>(layer_.directions * outside_rows());
    }

    // The rows of dx.
    ptrdiff_t outside_rows() const { return wants_x_ && I_ ? run_.dx.size / (layer_.directions * I_) : 0; }

    void pack(ptrdiff_t d, ptrdiff_t p) {
        const Weights& w = layer_.weights[d];
        const ptrdiff_t column = p * TILE_WIDTH<T>;
        if (wants_x_ && column < I_) pack_straight(in<const T>(w.w_ih), N_, I_, 0, w_ih_[d], p);
        if (column < P_) pack_straight(in<const T>(w.w_hh), N_, P_, N_ - free_, w_hh_[d], p);
        if (projects_ && column < H_) pack_straight(in<const T>(w.w_hr), P_, H_, 0, w_hr_[d], p);
    }

    // The first side sums directly in the result.
    Sums sums_of(ptrdiff_t d, ptrdiff_t side, T* memory) const {
        const Weights& g = run_.gradients[d];
        if (side == 0) return {in<T>(g.w_ih), in<T>(g.w_hh), in<T>(g.w_hr), memory};
        T* w_hh = memory + row_ + N_ * I_;
        return {memory + row_, w_hh, projects_ ? w_hh + N_ * P_ : nullptr, memory};
    }

    void clear(const Sums& sums) const {
        fill(N_ * I_, sums.w_ih);
        fill(N_ * P_, sums.w_hh);
        if (projects_) fill(P_ * H_, sums.w_hr);
        fill(row_, sums.bias);
    }

    // Adds up the sums of all sides. Each of `parts` calls does a part of it.
    void join(T* sums, ptrdiff_t d, ptrdiff_t part, ptrdiff_t parts) const {
        const auto of_side = [&](ptrdiff_t side) {
            return sums_of(d, side, sums + (side * layer_.directions + d) * sums_size());
        };
        const Weights& g = run_.gradients[d];
        for (ptrdiff_t side = 1; side < division_.sides; ++side) {
            const Sums more = of_side(side);
            const auto add_part = [&](ptrdiff_t count, const T* from, T* to) {
                const ptrdiff_t first = count * part / parts, stop = count * (part + 1) / parts;
                add(stop - first, from + first, to + first);
            };
            add_part(N_ * I_, more.w_ih, in<T>(g.w_ih));
            add_part(N_ * P_, more.w_hh, in<T>(g.w_hh));
            if (projects_) add_part(P_ * H_, more.w_hr, in<T>(g.w_hr));
        }
        if (part || !g.b_ih.data) return;
        T* total = of_side(0).bias;
        for (ptrdiff_t side = 1; side < division_.sides; ++side) add(row_, of_side(side).bias, total);
        for (ptrdiff_t j = 0; j < N_; ++j) in<T>(g.b_ih)[j] = total[free_ + j];
        for (ptrdiff_t j = 0; j < N_; ++j) in<T>(g.b_hh)[(j + N_ - free_) % N_] = total[j];
    }

    void run_block(const Block& block, T* scratch, const Sums& sums) const {
        const ptrdiff_t d = block.direction, most = block.active(0);
        T *deltas = scratch, *projected = deltas + DEPTH * delta_row_, *m_again = projected + MOST_ROWS * H_;
        T* packed = m_again + MOST_ROWS * H_;
        const T *history = in<const T>(layer_.history), *cells = in<const T>(layer_.cells);
        ptrdiff_t length[MOST_ROWS];
        T *dh[MOST_ROWS], *dc[MOST_ROWS] = {}, *dm[MOST_ROWS];
        for (ptrdiff_t i = 0; i < most; ++i) {
            const ptrdiff_t at = block.state(block.place(i));
            dh[i] = in<T>(run_.dh) + at * P_;
            if (sizes_.has_c) dc[i] = in<T>(run_.dc) + at * H_;
            dm[i] = projects_ ? projected + i * H_ : dh[i];
            length[i] = i ? length[i - 1] : layer_.steps;
            while (block.active(length[i] - 1) <= i) --length[i];
        }
        // For each row that has not been added to the weights' gradients yet:
        const T *delta[TABLE], *h[TABLE], *x[TABLE];
        T* dx[TABLE];
        ptrdiff_t waiting = 0;
        for (ptrdiff_t t = length[0] - 1; t >= 0; --t) {
            const ptrdiff_t m = block.active(t);
            for (ptrdiff_t i = 0; run_.d_output.data && i < m; ++i) {
                const ptrdiff_t outside = block.outside(t, block.place(i), length[i], layer_.scatter);
                add(P_, in<const T>(run_.d_output) + outside * run_.d_output_row + d * P_, dh[i]);
            }
            if (projects_) multiply(dh, w_hr_[d], AT_ZERO, static_cast<const T*>(nullptr), dm, m);
            for (ptrdiff_t i = 0; i < m; ++i) {
                const ptrdiff_t place = block.place(i), before = block.before(t, place), after = block.after(t, place);
                const ptrdiff_t outside = block.outside(t, place, length[i], layer_.gather), k = waiting + i;
                T *own = deltas + k * delta_row_, *m_row = m_again + i * H_;
                if (projects_) {
                    copy(P_, dh[i], own + row_);
                    m_row = own + row_ + P_;
                }
                const T* buffer = in<const T>(layer_.buffer);
                if (sizes_.saves_buffer) buffer += (d * layer_.rows + block.start(t) + place) * row_;
                const T *c = nullptr, *c_after = nullptr;
                if (sizes_.has_c) c = cells + before * H_, c_after = cells + after * H_;
                delta[k] = own;
                h[k] = history + before * P_;
                x[k] = in<const T>(layer_.x) + outside * layer_.x_row;
                if (wants_x_) dx[k] = in<T>(run_.dx) + (d * (run_.dx.size / layer_.directions)) + outside * I_;
                steps_.step_back(H_,
                                 RowBack<T>{buffer, h[k], c, history + after * P_, c_after, dm[i], dc[i], own, m_row});
            }
            multiply(delta + waiting, w_hh_[d], steps_.keeps_dh ? AT_C : AT_ZERO, static_cast<const T*>(nullptr), dh,
                     m);
            waiting += m;
            if (t == 0 || waiting + block.active(t - 1) > DEPTH) {
                if (wants_weights_) add_gradients(deltas, h, x, waiting, packed, sums);
                if (wants_x_) {
                    for (ptrdiff_t k = 0; k < waiting; ++k) delta[k] += free_;
                    multiply(delta, w_ih_[d], AT_ZERO, static_cast<const T*>(nullptr), dx, waiting);
                }
                waiting = 0;
            }
        }
    }

    // Adds the waiting rows to the weights' gradients.
    void add_gradients(const T* deltas, const T* const* h, const T* const* x, ptrdiff_t rows, T* packed,
                       const Sums& sums) const {
        const Panels<T> hs{packed, rows, P_}, xs{hs.data + Panels<T>::size(DEPTH, P_), rows, I_};
        T* columns = xs.data + Panels<T>::size(DEPTH, I_);
        pack_rows(h, hs);
        pack_rows(x, xs);
        for (ptrdiff_t k = 0; k < rows; ++k) add(row_, deltas + k * delta_row_, sums.bias);
        T* to[COLUMNS];
        for (ptrdiff_t block = 0; block < sizes_.width; ++block) {
            for (ptrdiff_t j = 0; j < H_; j += COLUMNS) {
                const ptrdiff_t count = min(COLUMNS, H_ - j);
                pack_columns(deltas + block * H_ + j, delta_row_, rows, count, columns);
                if (block < sizes_.gates) {
                    const ptrdiff_t first = (block * H_ + N_ - free_) % N_ + j;
                    for (ptrdiff_t r = 0; r < count; ++r) to[r] = sums.w_hh + (first + r) * P_;
                    multiply_columns(columns, count, hs, to);
                }
                if (block >= sizes_.width - sizes_.gates) {
                    const ptrdiff_t first = block * H_ - free_ + j;
                    for (ptrdiff_t r = 0; r < count; ++r) to[r] = sums.w_ih + (first + r) * I_;
                    multiply_columns(columns, count, xs, to);
                }
            }
        }
        if (!projects_) return;
        const Panels<T> ms{columns + DEPTH * COLUMNS, rows, H_};
        const T* m[TABLE];
        for (ptrdiff_t k = 0; k < rows; ++k) m[k] = deltas + k * delta_row_ + row_ + P_;
        pack_rows(m, ms);
        for (ptrdiff_t j = 0; j < P_; j += COLUMNS) {
            const ptrdiff_t count = min(COLUMNS, P_ - j);
            pack_columns(deltas + row_ + j, delta_row_, rows, count, columns);
            for (ptrdiff_t r = 0; r < count; ++r) to[r] = sums.w_hr + (j + r) * H_;
            multiply_columns(columns, count, ms, to);
        }
    }
};
