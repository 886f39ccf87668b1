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
          delta_row_(row_ + (projects_ ? P_ + H_ : 0) + PADDING<T>) {}

    Fault operator()() {
        take_memory();
        if (!memory_.allocate()) return NO_MEMORY;
        take_memory();
        const ptrdiff_t D = layer_.directions, tasks = D * division_.sides;
        const bool packs_any =
            (wants_x_ && w_ih_[0].is_packed) || w_hh_[0].is_packed || (projects_ && w_hr_[0].is_packed);
        const ptrdiff_t packs = packs_any ? D * divide_up(max(I_, max(P_, H_)), TILE_WIDTH<T>) : 0;
        run_tasks(layer_, packs + (wants_x_ ? D : 0), [&](ptrdiff_t k) {
            if (k < packs) return pack(k % D, k / D);
            const ptrdiff_t d = k - packs, rows = outside_rows();
            clear_padding(layer_, dx_of(d), rows, I_, is_there_ + d * rows);
        });
        run_tasks(layer_, tasks, [&](ptrdiff_t k) {
            const ptrdiff_t d = k % D, side = k / D;
            const Sums own = sums_of(d, side);
            if (wants_weights_) clear(own);
            for (ptrdiff_t first = side; first < layer_.sequences; first += division_.sides * division_.most)
                run_block(Block{layer_, d, first, division_.sides, division_.most}, k, own);
        });
        if (wants_weights_)
            run_tasks(layer_, D * layer_.threads, [&](ptrdiff_t k) { join(k % D, k / D, layer_.threads); });
        if (wants_x_ && D == 2) {
            const ptrdiff_t count = outside_rows() * I_, part = divide_up(count, layer_.threads);
            run_tasks(layer_, layer_.threads, [&](ptrdiff_t k) {
                const ptrdiff_t begin = min(k * part, count);
                add(min(part, count - begin), dx_of(1) + begin, dx_of(0) + begin);
            });
        }
        return nullptr;
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
    Straight<T> w_ih_[2], w_hh_[2], w_hr_[2];

    // Of each task: deltas of some rows, the gradients of m, m again, and the products' columns and panels.
    T *deltas_, *projected_, *m_again_, *hs_, *xs_, *ms_, *columns_;
    // Of each task: its sums of the gradients. The first tasks sum all but the biases' in the result.
    T *bias_, *more_w_ih_, *more_w_hh_, *more_w_hr_;
    unsigned char* is_there_;

    static constexpr ptrdiff_t COLUMNS = 96;  // of the deltas, packed at once: they fit the second-level cache
    static_assert(COLUMNS % TILE_ROWS == 0);

    void take_memory() {
        const ptrdiff_t D = layer_.directions, tasks = D * division_.sides, products = products_in_steps(layer_);
        for (ptrdiff_t d = 0; d < D; ++d) {
            const Weights& w = layer_.weights[d];
            if (wants_x_) w_ih_[d].take(w.w_ih, N_, I_, 0, products_at_once(layer_), memory_);
            w_hh_[d].take(w.w_hh, N_, P_, (N_ - free_) % N_, products, memory_);
            if (projects_) w_hr_[d].take(w.w_hr, P_, H_, 0, products, memory_);
        }
        deltas_ = memory_.take<T>(tasks * DEPTH * delta_row_);
        projected_ = memory_.take<T>(projects_ ? tasks * MOST_ROWS * H_ : 0);
        m_again_ = memory_.take<T>(tasks * MOST_ROWS * H_);
        if (wants_weights_) {
            hs_ = memory_.take<T>(tasks * Panels<T>::size(DEPTH, P_));
            xs_ = memory_.take<T>(tasks * Panels<T>::size(DEPTH, I_));
            ms_ = memory_.take<T>(projects_ ? tasks * Panels<T>::size(DEPTH, H_) : 0);
            columns_ = memory_.take<T>(tasks * DEPTH * COLUMNS);
            const ptrdiff_t more = tasks - D;  // the tasks that do not sum in the result
            bias_ = memory_.take<T>(tasks * row_);
            more_w_ih_ = memory_.take<T>(more * N_ * I_);
            more_w_hh_ = memory_.take<T>(more * N_ * P_);
            more_w_hr_ = memory_.take<T>(projects_ ? more * P_ * H_ : 0);
        }
        is_there_ = memory_.take<unsigned char>(D * outside_rows());
    }

    // The rows of dx.
    ptrdiff_t outside_rows() const { return wants_x_ && I_ ? run_.dx.size / I_ : 0; }

    T* dx_of(ptrdiff_t direction) const { return in<T>(direction ? run_.dx_of_backward : run_.dx); }

    void pack(ptrdiff_t d, ptrdiff_t p) {
        if (wants_x_) w_ih_[d].pack(p);
        w_hh_[d].pack(p);
        if (projects_) w_hr_[d].pack(p);
    }

    // The first side sums directly in the result.
    Sums sums_of(ptrdiff_t d, ptrdiff_t side) const {
        const Weights& g = run_.gradients[d];
        const ptrdiff_t task = side * layer_.directions + d, more = task - layer_.directions;
        T* bias = bias_ + task * row_;
        if (side == 0) return {in<T>(g.w_ih), in<T>(g.w_hh), in<T>(g.w_hr), bias};
        return {more_w_ih_ + more * N_ * I_, more_w_hh_ + more * N_ * P_,
                projects_ ? more_w_hr_ + more * P_ * H_ : nullptr, bias};
    }

    void clear(const Sums& sums) const {
        fill(N_ * I_, sums.w_ih);
        fill(N_ * P_, sums.w_hh);
        if (projects_) fill(P_ * H_, sums.w_hr);
        fill(row_, sums.bias);
    }

    // Adds up the sums of all sides. Each of `parts` calls does a part of it.
    void join(ptrdiff_t d, ptrdiff_t part, ptrdiff_t parts) const {
        const Weights& g = run_.gradients[d];
        for (ptrdiff_t side = 1; side < division_.sides; ++side) {
            const Sums more = sums_of(d, side);
            const auto add_part = [&](ptrdiff_t count, const T* from, T* to) {
                const ptrdiff_t first = count * part / parts, stop = count * (part + 1) / parts;
                add(stop - first, from + first, to + first);
            };
            add_part(N_ * I_, more.w_ih, in<T>(g.w_ih));
            add_part(N_ * P_, more.w_hh, in<T>(g.w_hh));
            if (projects_) add_part(P_ * H_, more.w_hr, in<T>(g.w_hr));
        }
        if (part || !g.b_ih.data) return;
        T* total = sums_of(d, 0).bias;
        for (ptrdiff_t side = 1; side < division_.sides; ++side) add(row_, sums_of(d, side).bias, total);
        for (ptrdiff_t j = 0; j < N_; ++j) in<T>(g.b_ih)[j] = total[free_ + j];
        for (ptrdiff_t j = 0; j < N_; ++j) in<T>(g.b_hh)[(j + N_ - free_) % N_] = total[j];
    }

    void run_block(const Block& block, ptrdiff_t task, const Sums& sums) const {
        const ptrdiff_t d = block.direction, most = block.active(0);
        T *deltas = deltas_ + task * DEPTH * delta_row_, *m_again = m_again_ + task * MOST_ROWS * H_;
        T* projected = projects_ ? projected_ + task * MOST_ROWS * H_ : nullptr;
        const T *history = in<const T>(layer_.history), *cells = in<const T>(layer_.cells);
        ptrdiff_t length[MOST_ROWS];
        T *dh[MOST_ROWS], *dc[MOST_ROWS] = {}, *dm[MOST_ROWS];
        for (ptrdiff_t i = 0; i < most; ++i) {
            const ptrdiff_t place = block.place(i);
            dh[i] = block.state<T>(run_.dh, place);
            if (sizes_.has_c) dc[i] = block.state<T>(run_.dc, place);
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
                const ptrdiff_t outside = block.row_at(t, block.place(i), length[i], layer_.output_is_padded);
                add(P_, in<const T>(run_.d_output) + outside * run_.d_output_row + d * P_, dh[i]);
            }
            if (projects_) w_hr_[d].multiply(dh, AT_ZERO, dm, m);
            for (ptrdiff_t i = 0; i < m; ++i) {
                const ptrdiff_t place = block.place(i), before = block.before(t, place), after = block.after(t, place);
                const ptrdiff_t outside = block.row_at(t, place, length[i], layer_.input_is_padded), k = waiting + i;
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
                if (wants_x_) dx[k] = dx_of(d) + outside * I_;
                steps_.step_back(H_,
                                 RowBack<T>{buffer, h[k], c, history + after * P_, c_after, dm[i], dc[i], own, m_row});
            }
            w_hh_[d].multiply(delta + waiting, steps_.keeps_dh ? AT_C : AT_ZERO, dh, m);
            waiting += m;
            if (t == 0 || waiting + block.active(t - 1) > DEPTH) {
                if (wants_weights_) add_gradients(task, deltas, h, x, waiting, sums);
                if (wants_x_) {
                    for (ptrdiff_t k = 0; k < waiting; ++k) delta[k] += free_;
                    w_ih_[d].multiply(delta, AT_ZERO, dx, waiting);
                }
                waiting = 0;
            }
        }
    }

    // Adds the waiting rows to the weights' gradients.
    void add_gradients(ptrdiff_t task, const T* deltas, const T* const* h, const T* const* x, ptrdiff_t rows,
                       const Sums& sums) const {
        const Panels<T> hs{hs_ + task * Panels<T>::size(DEPTH, P_), rows, P_};
        const Panels<T> xs{xs_ + task * Panels<T>::size(DEPTH, I_), rows, I_};
        T* columns = columns_ + task * DEPTH * COLUMNS;
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
        const Panels<T> ms{ms_ + task * Panels<T>::size(DEPTH, H_), rows, H_};
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
