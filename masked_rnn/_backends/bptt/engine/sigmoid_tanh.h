// sigmoid and tanh, with an error of at most two units in the last place at every size. Infinities and NaN give what
// ATen gives. The code is plain arithmetic on one number; the compiler vectorizes the loops that call it.
#pragma once

#include <stdint.h>

#include "level.h"

LEVEL_BEGIN
namespace masked_rnn::LEVEL {

template <class T>
struct Format;
template <>
struct Format<float> {
    using Bits = uint32_t;
    static constexpr int fraction = 23, bias = 127, terms = 7;
    static constexpr float zero_below = -104.0f;  // where exp is 0
    // ln 2 in two parts, the first of so few bits that its product with a whole number is exact.
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <>
struct Format<double> {
    using Bits = uint64_t;
    static constexpr int fraction = 52, bias = 1023, terms = 13;
    static constexpr double zero_below = -746.0;
    static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
};

ALWAYS_INLINE float magnitude(float x) { return __builtin_fabsf(x); }
ALWAYS_INLINE double magnitude(double x) { return __builtin_fabs(x); }
ALWAYS_INLINE float with_sign(float x, float sign) { return __builtin_copysignf(x, sign); }
ALWAYS_INLINE double with_sign(double x, double sign) { return __builtin_copysign(x, sign); }

template <int N>
constexpr double INVERSE_FACTORIAL = INVERSE_FACTORIAL<N - 1> / N;
template <>
constexpr double INVERSE_FACTORIAL<1> = 1.0;

// Horner's scheme: p r^(N - 1) + 1/N! r^(N - 2) + ... + 1/3! r + 1/2!
template <int N, class T>
ALWAYS_INLINE T add_terms(T p, T r) {
    if constexpr (N < 2)
        return p;
    else
        return add_terms<N - 1>(p * r + T(INVERSE_FACTORIAL<N>), r);
}

// exp(x) = 2^k (1 + p). p keeps its digits near 0; `power` is 2^(k + added).
template <class T>
ALWAYS_INLINE T exp_parts(T x, int added, T& power) {
    using F = Format<T>;
    constexpr T nearest = T(1.5) * T(uint64_t(1) << F::fraction);  // adding it rounds to a whole number
    const T rounded = x * T(1.4426950408889634) + nearest;
    const T k = rounded - nearest;
    const T r = x - k * F::ln2_high - k * F::ln2_low;
    const T p = add_terms<F::terms - 1>(T(INVERSE_FACTORIAL<F::terms>), r);
    typename F::Bits bits;
    __builtin_memcpy(&bits, &rounded, sizeof bits);
    bits = (bits << F::fraction) + (typename F::Bits(F::bias + added) << F::fraction);
    __builtin_memcpy(&power, &bits, sizeof bits);
    return p * r * r + r;
}

// e / (1 + e) or 1 / (1 + e), with e = exp(-|x|): neither form loses digits.
template <class T>
ALWAYS_INLINE T sigmoid(T x) {
    constexpr T least = Format<T>::zero_below;
    const T down = -magnitude(x);
    T power;
    const T p = exp_parts(down <= least ? least : down, 64, power);
    const T e = (p + 1) * power * T(1 / 18446744073709551616.0);  // 2^-64: e may be below the smallest normal number
    return (x <= 0 ? e : T(1)) / (e + 1);
}

// -t / (2 + t), with t = exp(-2|x|) - 1, which loses no digits near 0.
template <class T>
ALWAYS_INLINE T tanh(T x) {
    constexpr T least = -80;  // exp of it is a normal number, so small that t is -1 in both formats
    const T down = magnitude(x) * T(-2);
    T power;
    const T p = exp_parts(down <= least ? least : down, 0, power);
    const T t = p * power + (power - 1);
    return with_sign(-t / (t + 2), x);
}

}  // namespace masked_rnn::LEVEL
LEVEL_END
