// The forward loop through time: computes activations and states, first step first.
//
// B sequences, R rows that run, I input, H hidden, P state that is fed back, N = gates H.

template <class T>
class ForwardPass {
  public:
    explicit ForwardPass(const Forward& run)
        : run_(run),
          layer_(run.layer),
          sizes_(sizes_of(layer_.cell)),
          steps_(Steps<T>::of(layer_.cell)),
          division_(layer_),
          H_(layer_.hidden),
          P_(layer_.fed_back),
          N_(sizes_.gates * H_),
          free_((sizes_.width - sizes_.gates) * H_),
          row_(sizes_.width * H_),
          projects_(layer_.weights[0].w_hr.data),
          saves_(layer_.history.data) {}

    Fault operator()() {
        take_memory();
        if (!memory_.allocate()) return NO_MEMORY;
        take_memory();
        const ptrdiff_t tasks = layer_.directions * division_.sides;
        const bool packs_any = w_ih_[0].is_packed || w_hh_[0].is_packed || (projects_ && w_hr_[0].is_packed);
        const ptrdiff_t packs = packs_any ? layer_.directions * divide_up(N_, TILE_WIDTH<T>) : 0;
        run_tasks(layer_, packs + 1, [&](ptrdiff_t k) {
            if (k < packs)
                pack(k % layer_.directions, k / layer_.directions);
            else
                clear_padding(layer_, in<T>(run_.output), rows_of_output(), run_.output_row, is_there_);
        });
        run_tasks(layer_, tasks, [&](ptrdiff_t k) {
            const ptrdiff_t d = k % layer_.directions, side = k / layer_.directions, sides = division_.sides;
            for (ptrdiff_t first = side; first < layer_.sequences; first += sides * division_.most)
                run_block(Block{layer_, d, first, sides, division_.most}, k);
        });
        return nullptr;
    }

  private:
    const Forward& run_;
    const Layer& layer_;
    CellSizes sizes_;
    Steps<T> steps_;
    Division division_;
    ptrdiff_t H_, P_, N_, free_, row_;
    bool projects_, saves_;
    Memory memory_;
    Transposed<T> w_ih_[2], w_hh_[2], w_hr_[2];

    // Of each task: activations that are not saved, the biases that each row starts from, and m.
    T *buffers_, *biases_, *projected_;
    unsigned char* is_there_;

    // The stride of these activations.
    ptrdiff_t stride() const { return row_ + PADDING<T>; }
    ptrdiff_t rows_of_output() const { return run_.output.size / run_.output_row; }

    void take_memory() {
        const ptrdiff_t products = products_in_steps(layer_);
        for (ptrdiff_t d = 0; d < layer_.directions; ++d) {
            const Weights& w = layer_.weights[d];
            w_ih_[d].take(w.w_ih, N_, layer_.inputs, 0, products_at_once(layer_), memory_);
            w_hh_[d].take(w.w_hh, N_, P_, (N_ - free_) % N_, products, memory_);
            if (projects_) w_hr_[d].take(w.w_hr, P_, H_, 0, products, memory_);
        }
        const ptrdiff_t tasks = layer_.directions * division_.sides;
        buffers_ = memory_.take<T>(tasks * MOST_ROWS * stride());
        biases_ = memory_.take<T>(tasks * row_);
        projected_ = memory_.take<T>(projects_ ? tasks * MOST_ROWS * H_ : 0);
        is_there_ = memory_.take<unsigned char>(rows_of_output());
    }

    void pack(ptrdiff_t d, ptrdiff_t p) {
        w_ih_[d].pack(p);
        w_hh_[d].pack(p);
        if (projects_) w_hr_[d].pack(p);
    }

    // The initial value of a row's activations: b_ih + b_hh, except for the GRU's g, which starts from b_hn alone.
    void write_biases(const Weights& w, T* begin) const {
        const T *b_ih = in<const T>(w.b_ih), *b_hh = in<const T>(w.b_hh);
        const ptrdiff_t joined = N_ - free_;
        for (ptrdiff_t j = 0; j < free_; ++j) begin[j] = b_hh ? b_hh[joined + j] : T(0);
        for (ptrdiff_t j = 0; j < N_; ++j) begin[free_ + j] = b_ih ? b_ih[j] + (j < joined ? b_hh[j] : T(0)) : T(0);
    }

    void run_block(const Block& block, ptrdiff_t task) const {
        const ptrdiff_t d = block.direction, most = block.active(0);
        T *buffer = buffers_ + task * MOST_ROWS * stride(), *biases = biases_ + task * row_;
        T* projected = projects_ ? projected_ + task * MOST_ROWS * H_ : nullptr;
        T *history = in<T>(layer_.history), *cells = in<T>(layer_.cells);
        write_biases(layer_.weights[d], biases);
        ptrdiff_t length[MOST_ROWS];
        T *h[MOST_ROWS], *c[MOST_ROWS] = {}, *h_after[MOST_ROWS], *c_after[MOST_ROWS] = {};
        for (ptrdiff_t i = 0; i < most; ++i) {
            const ptrdiff_t place = block.place(i);
            h[i] = h_after[i] = block.state<T>(run_.h, place);
            if (sizes_.has_c) c[i] = c_after[i] = block.state<T>(run_.c, place);
            length[i] = i ? length[i - 1] : layer_.steps;
            while (block.active(length[i] - 1) <= i) --length[i];
            if (saves_) {
                copy(P_, h[i], history + block.before(0, place) * P_);
                if (sizes_.has_c) copy(H_, c[i], cells + block.before(0, place) * H_);
            }
        }
        const T* x[TABLE];
        T *own[TABLE], *gates[TABLE], *m_rows[MOST_ROWS];
        for (ptrdiff_t t = 0; t < length[0];) {
            // The input product of a group of steps, then these steps.
            const ptrdiff_t first = t;
            ptrdiff_t rows = 0;
            for (ptrdiff_t m; t < length[0] && (m = block.active(t), !rows || rows + m <= MOST_ROWS); ++t) {
                for (ptrdiff_t i = 0; i < m; ++i, ++rows) {
                    const ptrdiff_t place = block.place(i);
                    const ptrdiff_t row_of_x = block.row_at(t, place, length[i], layer_.input_is_padded);
                    x[rows] = in<const T>(layer_.x) + row_of_x * layer_.x_row;
                    own[rows] = saves_ && sizes_.saves_buffer
                                    ? in<T>(layer_.buffer) + (d * layer_.rows + block.start(t) + place) * row_
                                    : buffer + rows * stride();
                    gates[rows] = own[rows] + free_;
                    copy(free_, biases, own[rows]);
                }
            }
            w_ih_[d].multiply(x, AT_ROW, biases + free_, gates, rows);
            ptrdiff_t done = 0;
            for (ptrdiff_t s = first; s < t; ++s) {
                const ptrdiff_t m = block.active(s);
                for (ptrdiff_t i = 0; saves_ && i < m; ++i) {
                    const ptrdiff_t before = block.before(s, block.place(i)), after = block.after(s, block.place(i));
                    h[i] = history + before * P_, h_after[i] = history + after * P_;
                    if (sizes_.has_c) c[i] = cells + before * H_, c_after[i] = cells + after * H_;
                }
                w_hh_[d].multiply(h, AT_C, nullptr, own + done, m);
                for (ptrdiff_t i = 0; i < m; ++i) {
                    m_rows[i] = projects_ ? projected + i * H_ : h_after[i];
                    steps_.step(H_, Row<T>{own[done + i], h[i], c[i], m_rows[i], c_after[i]});
                }
                if (projects_) w_hr_[d].multiply(m_rows, AT_ZERO, nullptr, h_after, m);
                for (ptrdiff_t i = 0; i < m; ++i) {
                    const ptrdiff_t place = block.place(i);
                    const ptrdiff_t outside = block.row_at(s, place, length[i], layer_.output_is_padded);
                    T* output = in<T>(run_.output) + outside * run_.output_row + d * P_;
                    if (output != h_after[i]) copy(P_, h_after[i], output);  // the history may be the output
                    if (saves_ && s == length[i] - 1) {
                        copy(P_, h_after[i], block.state<T>(run_.h, place));
                        if (sizes_.has_c) copy(H_, c_after[i], block.state<T>(run_.c, place));
                    }
                }
                done += m;
            }
        }
    }
};
