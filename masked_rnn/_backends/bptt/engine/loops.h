// The two passes. A thread takes a block of sequences of one direction through all steps.

template <class T>
NEVER_INLINE void copy(ptrdiff_t count, const T* from, T* to) {
    SIMD
    for (ptrdiff_t j = 0; j < count; ++j) to[j] = from[j];
}

template <class T>
NEVER_INLINE void add(ptrdiff_t count, const T* from, T* to) {
    SIMD
    for (ptrdiff_t j = 0; j < count; ++j) to[j] += from[j];
}

template <class T>
NEVER_INLINE void fill(ptrdiff_t count, T* to) {
    SIMD
    for (ptrdiff_t j = 0; j < count; ++j) to[j] = 0;
}

static_assert(TABLE >= DEPTH && DEPTH >= MOST_ROWS);

// Zeros the rows of a matrix in the padded layout at which no sequence has a step. `is_there` is scratch memory, one byte
// for each row, which is used if the layer has an index.
template <class T>
NEVER_INLINE void clear_padding(const Layer& layer, T* matrix, ptrdiff_t rows, ptrdiff_t width,
                                unsigned char* is_there) {
    if (rows <= layer.rows) return;
    if (const int64_t* index = in<const int64_t>(layer.index)) {
        for (ptrdiff_t k = 0; k < rows; ++k) is_there[k] = 0;
        for (ptrdiff_t k = 0; k < layer.rows; ++k) is_there[index[k]] = 1;
        for (ptrdiff_t k = 0; k < rows; ++k)
            if (!is_there[k]) fill(width, matrix + k * width);
        return;
    }
    const int64_t* lengths = in<const int64_t>(layer.lengths);
    const ptrdiff_t steps = rows / layer.batch;
    for (ptrdiff_t n = 0; n < layer.batch; ++n)
        for (ptrdiff_t t = lengths[n]; t < steps; ++t)
            fill(width, matrix + (n * layer.sequence_stride + t * layer.step_stride) * width);
}

#include "forward.h"
#include "backward.h"

Fault forward(const Forward& run) {
    return run.layer.item_bytes == 4 ? ForwardPass<float>(run)() : ForwardPass<double>(run)();
}

Fault backward(const Backward& run) {
    return run.layer.item_bytes == 4 ? BackwardPass<float>(run)() : BackwardPass<double>(run)();
}
