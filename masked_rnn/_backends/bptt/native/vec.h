// A register of numbers as one value, in GCC's vector types. Each namespace has its own width: see level.h.

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
    typedef float type __attribute__((vector_size(REGISTER_BYTES)));
    typedef float unaligned __attribute__((vector_size(REGISTER_BYTES), aligned(4), may_alias));
};
template <>
struct VecOf<double> {
    typedef double type __attribute__((vector_size(REGISTER_BYTES)));
    typedef double unaligned __attribute__((vector_size(REGISTER_BYTES), aligned(8), may_alias));
};

template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
constexpr ptrdiff_t LANES = REGISTER_BYTES / sizeof(T);

template <class T>
ALWAYS_INLINE Vec<T> load(const T* from) {
    return *reinterpret_cast<const typename VecOf<T>::unaligned*>(from);
}

template <class T>
ALWAYS_INLINE void store(T* to, Vec<T> value) {
    *reinterpret_cast<typename VecOf<T>::unaligned*>(to) = value;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLES 1
#endif
#endif

#if HAS_SHUFFLES
// Interleaves the numbers from `begin` on of two registers.
template <class T, ptrdiff_t BEGIN, size_t... K>
ALWAYS_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<K...>) {
    return __builtin_shufflevector(a, b, (BEGIN + K / 2 + K % 2 * LANES<T>)...);
}
#endif

// Transposes the numbers in some registers.
template <class T>
ALWAYS_INLINE void transpose(Vec<T> (&rows)[LANES<T>]) {
    constexpr ptrdiff_t L = LANES<T>;
#if HAS_SHUFFLES
    // Each round interleaves the first half of the rows with the second.
    Vec<T> next[L];
#pragma GCC unroll 4
    for (ptrdiff_t round = 1; round < L; round *= 2) {
#pragma GCC unroll 16
        for (ptrdiff_t r = 0; r < L / 2; ++r) {
            next[2 * r] = interleave<T, 0>(rows[r], rows[r + L / 2], std::make_index_sequence<L>());
            next[2 * r + 1] = interleave<T, L / 2>(rows[r], rows[r + L / 2], std::make_index_sequence<L>());
        }
#pragma GCC unroll 16
        for (ptrdiff_t r = 0; r < L; ++r) rows[r] = next[r];
    }
#else
    for (ptrdiff_t r = 0; r < L; ++r)
        for (ptrdiff_t k = r + 1; k < L; ++k) {
            const T number = rows[r][k];
            rows[r][k] = rows[k][r];
            rows[k][r] = number;
        }
#endif
}
