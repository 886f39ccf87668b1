// How a layer's work is divided, and where its numbers lie.

constexpr ptrdiff_t MOST_ROWS = 64;           // sequences of a block, at most
constexpr ptrdiff_t BLOCK_BYTES = 192 << 10;  // of the activations that a block has at one step
constexpr ptrdiff_t DEPTH = 256;              // rows whose share of the weights' gradients is summed at once
constexpr ptrdiff_t GROUP_BYTES = 192 << 10;  // of the activations whose input product runs at once
constexpr ptrdiff_t TABLE = DEPTH;            // rows in a table of addresses, at most

// Behind each row of scratch memory. Rows a multiple of 4 KiB apart would take the same places in the first-level cache,
// and a load of one would wait for a store to another.
template <class T>
constexpr ptrdiff_t PADDING = 64 / sizeof(T);

// Not those of <algorithm>: what the linker keeps of a standard template may be compiled for another CPU.
ALWAYS_INLINE ptrdiff_t min(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
ALWAYS_INLINE ptrdiff_t max(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
ALWAYS_INLINE ptrdiff_t divide_up(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }

template <class T>
ALWAYS_INLINE T* in(const Array& array) {
    return static_cast<T*>(array.data);
}

// The sequences of a direction are dealt out to blocks like cards, so that long and short ones are shared evenly. A
// side is what one task does: some blocks, one after the other.
struct Division {
    ptrdiff_t sides, blocks;

    explicit Division(const Layer& layer) {
        sides = max(1, min(divide_up(layer.threads, layer.directions), layer.sequences));
        const ptrdiff_t row_bytes = sizes_of(layer.cell).width * layer.hidden * layer.item_bytes;
        const ptrdiff_t most = max(TILE_ROWS, min(BLOCK_BYTES / row_bytes, MOST_ROWS));
        blocks = sides * divide_up(divide_up(layer.sequences, sides), most);
    }
};

// One block: which sequences run in it, by their sorted place.
struct Block {
    const Layer& layer;
    ptrdiff_t direction, first, stride;

    ptrdiff_t place(ptrdiff_t i) const { return first + i * stride; }

    // How many of the block's sequences run at step t.
    ptrdiff_t active(ptrdiff_t t) const {
        const ptrdiff_t all = in<const int64_t>(layer.sizes)[t];
        return all <= first ? 0 : stride == 1 ? all - first : (all - first - 1) / stride + 1;
    }

    ptrdiff_t start(ptrdiff_t t) const { return in<const int64_t>(layer.starts)[t]; }

    // The row of a sequence's state in (D, N).
    ptrdiff_t state(ptrdiff_t place) const {
        const int64_t* order = in<const int64_t>(layer.order);
        return direction * layer.batch + (order ? order[place] : place);
    }

    // The row in (D, B + R) of the state before step t.
    ptrdiff_t before(ptrdiff_t t, ptrdiff_t place) const {
        return direction * (layer.sequences + layer.rows) + place + (t ? layer.sequences + start(t - 1) : 0);
    }

    ptrdiff_t after(ptrdiff_t t, ptrdiff_t place) const { return before(t + 1, place); }

    // The row of step t in the input or output. The second direction reads a sequence of `length` steps backward.
    ptrdiff_t outside(ptrdiff_t t, ptrdiff_t place, ptrdiff_t length, bool as_callers) const {
        const ptrdiff_t row = start(direction ? length - 1 - t : t) + place;
        const int64_t* index = as_callers ? in<const int64_t>(layer.index) : nullptr;
        return index ? index[row] : row;
    }
};

// Memory for a call. An address is null when there was none.
class Memory {
  public:
    explicit Memory(size_t bytes) : bytes_(static_cast<char*>(malloc(bytes + ALIGNMENT))), size_(bytes) {}
    ~Memory() { free(bytes_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    explicit operator bool() const { return bytes_ != nullptr; }

    template <class T>
    T* take(size_t count) {
        const size_t begin = reinterpret_cast<size_t>(bytes_) + used_;
        const size_t aligned = (begin + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        used_ = aligned - reinterpret_cast<size_t>(bytes_) + count * sizeof(T);
        if (used_ > size_ + ALIGNMENT) abort();  // `bytes_for` and `take` disagree
        return reinterpret_cast<T*>(aligned);
    }

    // What `take` needs for so many numbers.
    template <class T>
    static size_t bytes_for(size_t count) {
        return count * sizeof(T) + ALIGNMENT;
    }

  private:
    static constexpr size_t ALIGNMENT = 64;
    char* bytes_;
    size_t size_, used_ = 0;
};
