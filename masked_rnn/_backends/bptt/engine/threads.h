// Shares tasks among threads. Each thread takes the next task that is left, so fewer threads can do them all, too.
#pragma once

#include <atomic>

#include "layer.h"

namespace masked_rnn {

// Runs a function in this thread and in `more` new ones. Defined in library.cpp, which is compiled for any CPU.
void run_on_own_threads(void (*function)(void*), void* data, int64_t more);

template <class Task>
void run_tasks(const Layer& layer, int64_t tasks, const Task& task) {
    if (tasks <= 1 || layer.threads <= 1) {
        for (int64_t k = 0; k < tasks; ++k) task(k);
        return;
    }
    struct Shared {
        const Task& task;
        int64_t tasks;
        std::atomic<int64_t> next;
    } shared{task, tasks, {0}};
    const auto work = [](void* data) {
        Shared& mine = *static_cast<Shared*>(data);
        for (int64_t k; (k = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.tasks;) mine.task(k);
    };
    if (layer.parallel)  // always the same number: GNU OpenMP ends the threads that a smaller team does not use
        layer.parallel(work, &shared, static_cast<unsigned>(layer.threads), 0);
    else
        run_on_own_threads(work, &shared, (tasks < layer.threads ? tasks : layer.threads) - 1);
}

}  // namespace masked_rnn
