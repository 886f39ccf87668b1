// The library's functions. They find out the kind of CPU, and check every pointer's size before anything is read.

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

#include <system_error>
#include <thread>
#include <vector>

#include "interface.h"
#include "threads.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace masked_rnn {

#define DECLARE(level)               \
    namespace level {                \
    Fault forward(const Forward&);   \
    Fault backward(const Backward&); \
    }
DECLARE(baseline)
#if defined(__x86_64__)
DECLARE(avx2)
DECLARE(avx512)
#endif

void run_on_own_threads(void (*function)(void*), void* data, int64_t more) {
    std::vector<std::thread> threads;
    try {
        for (int64_t k = 0; k < more; ++k) threads.emplace_back(function, data);
    } catch (const std::exception&) {
        // No more threads could be started. The others do all tasks.
    }
    function(data);
    for (std::thread& thread : threads) thread.join();
}

namespace {

// The kinds of CPU, least first.
enum Level : int64_t { BASELINE, AVX2, AVX512 };

bool is_supported(int64_t level) {
#if defined(__x86_64__)
#if defined(PLAY_AVX512)  // see avx512.cpp
    if (level == AVX512) return is_supported(AVX2);
#endif
    if (level == AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && is_supported(AVX2);
    if (level == AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return level == BASELINE;
}

// The product of any two sizes, the number of a cell's blocks and two directions must not overflow.
constexpr int64_t MOST = int64_t(1) << 29;
bool is_size(int64_t number) { return 0 <= number && number <= MOST; }

bool holds(const Array& array, int64_t size) { return array.data && array.size >= size; }
bool is_absent(const Array& array) { return !array.data; }
bool fits(const Array& array, int64_t size) { return is_absent(array) || array.size >= size; }

Fault check(const Layer& layer) {
    const CellSizes cell = sizes_of(layer.cell);
    const int64_t D = layer.directions, I = layer.inputs, H = layer.hidden, P = layer.fed_back;
    if (layer.cell < GRU || layer.cell > RNN_RELU || (layer.item_bytes != 4 && layer.item_bytes != 8) ||
        (D != 1 && D != 2) || !is_size(I) || !is_size(H) || !is_size(P) || !is_size(layer.batch) || !is_size(layer.rows) ||
        !is_size(layer.steps) || !is_size(layer.threads) || H < 1 || P < 1 || layer.threads < 1 || layer.batch < 1 || layer.sequences < 1 ||
        layer.sequences > layer.batch || layer.steps < 1 || layer.rows < 1)
        return BAD_LAYER;
    if (!holds(layer.sizes, layer.steps + 1) || !holds(layer.starts, layer.steps + 1)) return BAD_STEPS;
    const auto* sizes = static_cast<const int64_t*>(layer.sizes.data);
    const auto* starts = static_cast<const int64_t*>(layer.starts.data);
    if (sizes[0] != layer.sequences || sizes[layer.steps] != 0 || starts[0] != 0 || starts[layer.steps] != layer.rows)
        return BAD_STEPS;
    for (int64_t t = 0; t < layer.steps; ++t)
        if (sizes[t] < sizes[t + 1] || sizes[t] < 1 || starts[t + 1] != starts[t] + sizes[t]) return BAD_STEPS;
    if (layer.index.data) {
        if (layer.index.size < layer.rows) return BAD_INDEX;
    }
    if (layer.order.data) {
        if (layer.order.size < layer.sequences) return BAD_ORDER;
        const auto* order = static_cast<const int64_t*>(layer.order.data);
        for (int64_t k = 0; k < layer.sequences; ++k)
            if (order[k] < 0 || order[k] >= layer.batch) return BAD_ORDER;
    }
    const bool projects = layer.weights[0].w_hr.data, biased = layer.weights[0].b_ih.data;
    if (projects ? layer.cell != LSTM || P > H : P != H) return BAD_WEIGHTS;
    for (int64_t d = 0; d < D; ++d) {
        const Weights& w = layer.weights[d];
        if (!holds(w.w_ih, cell.gates * H * I) || !holds(w.w_hh, cell.gates * H * P) ||
            (projects ? !holds(w.w_hr, P * H) : !is_absent(w.w_hr)) ||
            (biased ? !holds(w.b_ih, cell.gates * H) || !holds(w.b_hh, cell.gates * H)
                    : !is_absent(w.b_ih) || !is_absent(w.b_hh)))
            return BAD_WEIGHTS;
    }
    return NONE;
}

// Whether all rows of the layer's index, of `width` numbers and `stride` apart, lie within an array.
bool reaches(const Layer& layer, const Array& array, int64_t stride, int64_t width, bool as_callers) {
    if (!array.data || stride < 0) return false;
    const int64_t last = array.size - width;  // the last place where a row may begin; row * stride could overflow
    const auto row_fits = [&](int64_t row) { return row >= 0 && last >= 0 && (!stride || row <= last / stride); };
    if (!as_callers || !layer.index.data) return row_fits(layer.rows - 1);
    const auto* index = static_cast<const int64_t*>(layer.index.data);
    int64_t least = index[0], most = index[0];
    for (int64_t k = 1; k < layer.rows; ++k) {
        least = index[k] < least ? index[k] : least;
        most = index[k] > most ? index[k] : most;
    }
    return row_fits(least) && row_fits(most);
}

Fault check_saved(const Layer& layer) {
    const CellSizes cell = sizes_of(layer.cell);
    const int64_t D = layer.directions, states = layer.sequences + layer.rows;
    if (!holds(layer.history, D * states * layer.fed_back)) return BAD_SAVED;
    if (cell.has_c && !holds(layer.cells, D * states * layer.hidden)) return BAD_SAVED;
    if (cell.saves_buffer && !holds(layer.buffer, D * layer.rows * cell.width * layer.hidden)) return BAD_SAVED;
    return NONE;
}

Fault check_states(const Layer& layer, const Array& h, const Array& c) {
    const int64_t states = layer.directions * layer.batch;
    if (!holds(h, states * layer.fed_back)) return BAD_STATES;
    if (sizes_of(layer.cell).has_c && !holds(c, states * layer.hidden)) return BAD_STATES;
    return NONE;
}

Fault check(const Forward& run) {
    const Layer& layer = run.layer;
    if (const Fault fault = check(layer)) return fault;
    if (const Fault fault = check_states(layer, run.h, run.c)) return fault;
    if (!reaches(layer, layer.x, layer.x_row, layer.inputs, layer.gather)) return BAD_INPUT;
    if (run.output_row < layer.directions * layer.fed_back) return BAD_OUTPUT;
    if (!reaches(layer, run.output, run.output_row, layer.directions * layer.fed_back, layer.scatter))
        return BAD_OUTPUT;
    return layer.history.data ? check_saved(layer) : NONE;
}

Fault check(const Backward& run) {
    const Layer& layer = run.layer;
    const CellSizes cell = sizes_of(layer.cell);
    const int64_t D = layer.directions, I = layer.inputs, H = layer.hidden, P = layer.fed_back;
    if (const Fault fault = check(layer)) return fault;
    if (const Fault fault = check_saved(layer)) return fault;
    if (const Fault fault = check_states(layer, run.dh, run.dc)) return fault;
    if (!reaches(layer, layer.x, layer.x_row, I, layer.gather)) return BAD_INPUT;
    if (run.d_output.data && !reaches(layer, run.d_output, run.d_output_row, D * P, layer.scatter))
        return BAD_GRADIENTS;
    const Array of_one_direction{run.dx.data, run.dx.size / D};
    if (run.dx.data && !reaches(layer, of_one_direction, I, I, layer.gather)) return BAD_GRADIENTS;
    if (is_absent(run.gradients[0].w_hh)) return NONE;
    for (int64_t d = 0; d < D; ++d) {
        const Weights &g = run.gradients[d], &w = layer.weights[d];
        if (!holds(g.w_ih, cell.gates * H * I) || !holds(g.w_hh, cell.gates * H * P) ||
            (w.w_hr.data && !holds(g.w_hr, P * H)) || !fits(g.b_ih, cell.gates * H) || !fits(g.b_hh, cell.gates * H) ||
            is_absent(g.b_ih) != is_absent(g.b_hh))
            return BAD_GRADIENTS;
    }
    return NONE;
}

// GNU's malloc asks the system anew for each block above 32 MiB. In pages of 4 KiB that takes 4 % of a training step.
void ask_for_large_pages(const Layer& layer) {
#if defined(MADV_HUGEPAGE)
    constexpr size_t LEAST = size_t(32) << 20, PAGE = 4096;
    for (const Array& array : {layer.history, layer.cells, layer.buffer}) {
        const size_t begin = reinterpret_cast<size_t>(array.data), end = begin + size_t(array.size) * layer.item_bytes;
        const size_t whole = (begin + PAGE - 1) / PAGE * PAGE;
        if (end - begin >= LEAST) madvise(reinterpret_cast<void*>(whole), end - whole, MADV_HUGEPAGE);
    }
#else
    (void)layer;
#endif
}

template <class Run>
using Loops = Fault (*)(const Run&);

template <class Run>
int64_t check_and_run(const Run* run, int64_t level, Loops<Run> baseline, Loops<Run> avx2, Loops<Run> avx512) {
    if (!is_supported(level)) return BAD_LAYER;
    if (const Fault fault = check(*run)) return fault;
    ask_for_large_pages(run->layer);
    return (level == AVX512 ? avx512 : level == AVX2 ? avx2 : baseline)(*run);
}

}  // namespace
}  // namespace masked_rnn

using namespace masked_rnn;

#if defined(__x86_64__)
#define LEVELS(pass) baseline::pass, avx2::pass, avx512::pass
#else
#define LEVELS(pass) baseline::pass, baseline::pass, baseline::pass
#endif

EXPORT int64_t masked_rnn_interface() { return INTERFACE; }

// The digest of the sources that this library was built from. setup.py sets it.
EXPORT const char* masked_rnn_digest() { return SOURCES_DIGEST; }

EXPORT int64_t masked_rnn_supports(int64_t level) { return is_supported(level); }

EXPORT int64_t masked_rnn_forward(const Forward* run, int64_t level) {
    return check_and_run(run, level, LEVELS(forward));
}

EXPORT int64_t masked_rnn_backward(const Backward* run, int64_t level) {
    return check_and_run(run, level, LEVELS(backward));
}
