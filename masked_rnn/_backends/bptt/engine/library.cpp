// The library's functions. They run the loops for a kind of CPU, after plan.h and check.h have checked the record.

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "interface.h"
#include "layer.h"
#include "plan.h"
#include "stack.h"
#include "threads.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace masked_rnn {

namespace baseline {
extern const Loops LOOPS;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Loops LOOPS;
}
namespace avx512 {
extern const Loops LOOPS;
}
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

// GNU's malloc asks the system anew for each block above 32 MiB, which takes less time in large pages.
void ask_for_large_pages(const Run& run) {
#if defined(MADV_HUGEPAGE)
    constexpr size_t LEAST = size_t(32) << 20;          // malloc's greatest threshold
    const size_t page = size_t(sysconf(_SC_PAGESIZE));  // madvise wants whole pages
    const size_t begin = reinterpret_cast<size_t>(run.saved.data),
                 end = begin + size_t(run.saved.size) * run.item_bytes;
    const size_t whole = (begin + page - 1) / page * page;
    if (run.saved.data && end - begin >= LEAST) madvise(reinterpret_cast<void*>(whole), end - whole, MADV_HUGEPAGE);
#else
    (void)run;
#endif
}

const Loops& loops_of(int64_t level) {
#if defined(__x86_64__)
    if (level == AVX512) return avx512::LOOPS;
    if (level == AVX2) return avx2::LOOPS;
#endif
    (void)level;
    return baseline::LOOPS;
}

using PassFunction = Fault (Stack::*)() const;

Fault check_and_run(const Run* run, int64_t level, PassFunction pass) {
    if (!is_supported(level)) return "level";
    try {
        Stack stack(*run, loops_of(level));
        if (const Fault fault = stack.check()) return fault;
        ask_for_large_pages(*run);
        return (stack.*pass)();
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    } catch (const std::length_error&) {
        return NO_MEMORY;
    }
}

}  // namespace
}  // namespace masked_rnn

using namespace masked_rnn;

EXPORT int64_t masked_rnn_interface() { return INTERFACE; }

EXPORT int64_t masked_rnn_record_bytes() { return sizeof(Run); }

// The digest of the sources that this library was built from. setup.py sets it.
EXPORT const char* masked_rnn_digest() { return SOURCES_DIGEST; }

EXPORT int64_t masked_rnn_supports(int64_t level) { return is_supported(level); }

// Counts how many of N sequences have a step, and how many steps there are. `counts` gets the members of Counts.
EXPORT void masked_rnn_count(const int64_t* lengths, int64_t batch, int64_t steps, int64_t* counts) {
    const Counts found = count_lengths(lengths, batch, steps);
    counts[0] = found.sequences, counts[1] = found.rows, counts[2] = found.fault, counts[3] = found.unsorted;
}

// Returns null, or the part of the record that does not fit, in words.
EXPORT const char* masked_rnn_forward(const Run* run, int64_t level) {
    return check_and_run(run, level, &Stack::forward);
}

EXPORT const char* masked_rnn_backward(const Run* run, int64_t level) {
    return check_and_run(run, level, &Stack::backward);
}
