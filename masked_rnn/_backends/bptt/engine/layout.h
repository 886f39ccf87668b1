// How a layer's work is divided among blocks and tasks, and where its numbers are in memory.

// The most sequences in a block, and the most rows in an input product. Each block reads the whole weights at each step,
// so fewer would cost more for weights that do not fit the cache than their activations' bytes would save.
constexpr ptrdiff_t MOST_ROWS = 64;
constexpr ptrdiff_t DEPTH = 256;    // the rows that are added to the weights' gradients at once
constexpr ptrdiff_t TABLE = DEPTH;  // the most rows in a table of addresses

// Unused space after each row of scratch memory. Without it, rows could be a multiple of 4 KiB apart. They would then
// compete for the same places of the first-level cache, and a load from one would wait for a store to another.
template <class T>
constexpr ptrdiff_t PADDING = 64 / sizeof(T);

// <algorithm> is not used: of a standard template the linker may keep a copy that was compiled for another CPU.
ALWAYS_INLINE constexpr ptrdiff_t min(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
ALWAYS_INLINE constexpr ptrdiff_t max(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
ALWAYS_INLINE constexpr ptrdiff_t divide_up(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }

template <class T>
ALWAYS_INLINE T* in(const Array& array) {
    return static_cast<T*>(array.data);
}

// The sequences of a direction are dealt out to sides in turns, so that each side gets long and short ones. A side is the
// work of one task: some blocks, one after the other, each of sequences that are next to each other on that side. So
// their lengths are alike, and one block's rows are close together in memory.
struct Division {
    ptrdiff_t sides, most;  // the most sequences in a block

    explicit Division(const Layer& layer) {
        sides = max(1, min(divide_up(layer.threads, layer.directions), layer.sequences));
        const ptrdiff_t of_side = divide_up(layer.sequences, sides);
        most = divide_up(of_side, divide_up(of_side, MOST_ROWS));
    }
};

// Whether so many products of one or two rows with a weight, whose rows are K numbers, are faster where it lies. That
// saves packing it, which takes a time in proportion to K, but each product takes longer by the same time for every K.
template <class T>
bool stays_in_place(ptrdiff_t K, ptrdiff_t products) {
    return products <= max(1, K / (LANES<T> + 8));
}

// The products of one or two rows, if a weight is multiplied with all rows at once, or with those of each step.
inline ptrdiff_t products_at_once(const Layer& layer) { return divide_up(layer.rows, 2); }
inline ptrdiff_t products_in_steps(const Layer& layer) {
    ptrdiff_t products = 0;
    for (ptrdiff_t t = 0; t < layer.steps; ++t) products += divide_up(in<const int64_t>(layer.sizes)[t], 2);
    return products;
}

// One block: the sequences in it, by their sorted places.
struct Block {
    const Layer& layer;
    ptrdiff_t direction, first, stride, most;

    ptrdiff_t place(ptrdiff_t i) const { return first + i * stride; }

    // The number of the block's sequences that run at step t.
    ptrdiff_t active(ptrdiff_t t) const {
        const ptrdiff_t all = in<const int64_t>(layer.sizes)[t];
        return all <= first ? 0 : min(most, stride == 1 ? all - first : (all - first - 1) / stride + 1);
    }

    ptrdiff_t start(ptrdiff_t t) const { return in<const int64_t>(layer.starts)[t]; }

    ptrdiff_t sequence(ptrdiff_t place) const {
        const int64_t* order = in<const int64_t>(layer.order);
        return order ? order[place] : place;
    }

    template <class T>
    T* state(const States& states, ptrdiff_t place) const {
        return static_cast<T*>(states.data) + direction * states.direction_stride +
               sequence(place) * states.sequence_stride;
    }

    // The row in (D, B + R) of the state before step t.
    ptrdiff_t before(ptrdiff_t t, ptrdiff_t place) const {
        return direction * (layer.sequences + layer.rows) + place + (t ? layer.sequences + start(t - 1) : 0);
    }

    ptrdiff_t after(ptrdiff_t t, ptrdiff_t place) const { return before(t + 1, place); }

    // The row of step t in the input or output. The second direction reads a sequence of `length` steps from its end.
    ptrdiff_t row_at(ptrdiff_t t, ptrdiff_t place, ptrdiff_t length, bool is_padded) const {
        const ptrdiff_t step = direction ? length - 1 - t : t, row = start(step) + place;
        if (!is_padded) return row;
        if (const int64_t* index = in<const int64_t>(layer.index)) return index[row];
        return sequence(place) * layer.sequence_stride + step * layer.step_stride;
    }
};

// Scratch memory for a call. A pass takes its arrays twice: first to count their bytes, then, after `allocate`, to get
// them.
class Memory {
  public:
    Memory() = default;
    ~Memory() { free(begin_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    template <class T>
    T* take(size_t count) {
        const size_t at = used_, bytes = count * sizeof(T);
        used_ = (at + bytes + SPACE + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        if (!begin_) return nullptr;
        close(first() + at + bytes, used_ - at - bytes);
        return reinterpret_cast<T*>(first() + at);
    }

    // Returns false if there is not as much memory.
    bool allocate() {
        begin_ = static_cast<char*>(malloc(used_ + ALIGNMENT));
        used_ = 0;
        return begin_;
    }

  private:
    static constexpr size_t ALIGNMENT = 64;
#if defined(__SANITIZE_ADDRESS__)
    // The sanitizer reports an access to the space after an array, as if each array had been allocated by itself.
    static constexpr size_t SPACE = ALIGNMENT;
    static void close(const char* from, size_t bytes) { __asan_poison_memory_region(from, bytes); }
#else
    static constexpr size_t SPACE = 0;
    static void close(const char*, size_t) {}
#endif

    char* first() const {
        const size_t address = reinterpret_cast<size_t>(begin_);
        return begin_ + (ALIGNMENT - address % ALIGNMENT) % ALIGNMENT;
    }

    char* begin_ = nullptr;
    size_t used_ = 0;
};
