// Scratch memory for a pass.
#pragma once

#include <stddef.h>
#include <stdlib.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "level.h"

LEVEL_BEGIN
namespace masked_rnn::LEVEL {

class Memory {
  public:
    Memory() = default;
    ~Memory() { free(begin_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    // `take_all` takes every array. It is called twice: to count their bytes, and to get them. Returns false if there
    // is not as much memory.
    template <class TakeAll>
    bool allocate(const TakeAll& take_all) {
        take_all();
        begin_ = static_cast<char*>(malloc(used_ + ALIGNMENT));
        if (!begin_) return false;
        used_ = 0;
        take_all();
        return true;
    }

    template <class T>
    T* take(size_t count) {
        const size_t at = used_, bytes = count * sizeof(T);
        used_ = (at + bytes + SPACE + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        if (!begin_) return nullptr;
        close(first() + at + bytes, used_ - at - bytes);
        return reinterpret_cast<T*>(first() + at);
    }

  private:
    static constexpr size_t ALIGNMENT = 64;  // a cache line, and the largest register
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

}  // namespace masked_rnn::LEVEL
LEVEL_END
