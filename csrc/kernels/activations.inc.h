/* SPDX-License-Identifier: Apache-2.0
 *
 * activations.inc.h - what a feed-forward network does to each number (kernels.inc.h includes it).
 *
 * No function subtracts numbers that are nearly equal. So its relative error is small for every x, also where results
 * are near 0.
 */

#ifndef MHA_ACTIVATIONS_INC_H
#define MHA_ACTIVATIONS_INC_H

/* The probability that a standard normal number is above t >= 0 is s p(s) exp(-t^2 / 2), where s = TAIL / (TAIL + t) is
 * between 0 and 1. The polynomials are minimax in the relative error, which is 2^-24.5 for t up to 13.5, and 2^-56.2 for
 * t up to 38 (Remez' algorithm). TAIL makes it small. Above LAST_TAIL, the exponential is 0. */
#define TAIL_f32 3.0f
#define TAIL_f64 5.0
#define LAST_TAIL_f32 16.0f
#define LAST_TAIL_f64 40.0
static const float tail_coefficients_f32[] = {
    -0x1.7a61b6p-6f, 0x1.0c9faap-3f, -0x1.1904f0p-2f, 0x1.c79538p-3f, -0x1.c85192p-5f,
    0x1.ef14f0p-4f,  0x1.cb82a2p-4f, 0x1.11a012p-3f,  0x1.1049c0p-3f,
};
static const double tail_coefficients_f64[] = {
    -0x1.c1361cdf1579ep-11, 0x1.589d8b64dcb6ap-7,  -0x1.e43d7ad845565p-5, 0x1.9baefbf4558acp-3,  -0x1.d8837419bf2e5p-2,
    0x1.84a537af85e42p-1,   -0x1.de6e1dba4017fp-1, 0x1.c96de0b9a4aa7p-1,  -0x1.5b7d3a07cd71dp-1, 0x1.a4ba6028f5a0bp-2,
    -0x1.a47343a72bd50p-3,  0x1.5635b9f58d1c6p-4,  -0x1.47748776f446ap-6, 0x1.6cc7fd2076c74p-6,  0x1.8adcdb10aef1dp-6,
    0x1.36085a7b78996p-5,   0x1.97934bb1cea59p-5,  0x1.f3ec67dab2b19p-5,  0x1.1f984390828b0p-4,  0x1.39bdb460b5e02p-4,
    0x1.46d04277ffdd7p-4,   0x1.46d04297e12a7p-4,
};

#endif

INLINE VEC V(minus)(VEC x)
{
    return V(splat)(0) - x;
}

/* -|x| */
INLINE VEC V(minus_magnitude)(VEC x)
{
    return V(minus)(V(max)(x, V(minus)(x)));
}

/* NaN stays, as in torch. */
INLINE VEC V(relu)(VEC x)
{
    return V(zero_below)(x, x, V(splat)(0));
}

/* x P(X < x) for a standard normal number X: the positive part of x, less |x| times the probability of a number beyond
 * |x| (Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016). */
INLINE VEC V(gelu)(VEC x)
{
    const VEC t = V(minus)(V(max)(V(minus_magnitude)(x), V(splat)(-V(LAST_TAIL))));
    const VEC s = V(splat)(V(TAIL)) / (V(splat)(V(TAIL)) + t);
    VEC p = V(splat)(V(tail_coefficients)[0]);
    MHA_UNROLL
    for (size_t c = 1; c < sizeof V(tail_coefficients) / sizeof(REAL); c++)
        p = V(fma)(p, s, V(splat)(V(tail_coefficients)[c]));
    const VEC beyond = (p * s) * V(exp)(t * t * V(splat)((REAL)-0.5));
    return V(fma)(V(minus)(t), beyond, V(relu)(x));
}

/* x / (1 + exp(-z)), with an exponential of at most 1. */
INLINE VEC V(times_sigmoid)(VEC x, VEC z)
{
    const VEC one = V(splat)(1), e = V(exp)(V(minus_magnitude)(z));
    return x * V(max)(e, V(zero_below)(one, z, V(splat)(0))) / (one + e);
}

/* x (1 + tanh(u)) / 2 is x / (1 + exp(-2 u)), where u = sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE VEC V(gelu_tanh)(VEC x)
{
    const VEC linear = V(splat)((REAL)0x1.9884533d43651p+0), cubic = V(splat)((REAL)0x1.2444f2a4d8b4bp-4);
    return V(times_sigmoid)(x, x * V(fma)(x * x, cubic, linear));
}

INLINE VEC V(activated)(VEC x, const mha_activation activation)
{
    switch (activation) {
    case MHA_RELU:
        return V(relu)(x);
    case MHA_GELU:
        return V(gelu)(x);
    case MHA_GELU_TANH:
        return V(gelu_tanh)(x);
    case MHA_SILU:
        return V(times_sigmoid)(x, x);
    case MHA_QUICK_GELU:
        return V(times_sigmoid)(x, x * V(splat)((REAL)1.702));
    }
    return x;
}

/* The activation, and whether there is a factor, are constants in every copy. */
INLINE void V(activate_all)(REAL *x, const REAL *factor, size_t n, const mha_activation activation,
                            const bool has_factor)
{
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        VEC y = V(activated)(V(load)(x + i), activation);
        if (has_factor)
            y = y * V(load)(factor + i);
        V(store)(x + i, y);
    }
    if (i < n) {
        REAL last[V(lanes)] = {0}, factors[V(lanes)] = {0};
        memcpy(last, x + i, (n - i) * sizeof(REAL));
        if (has_factor)
            memcpy(factors, factor + i, (n - i) * sizeof(REAL));
        VEC y = V(activated)(V(load)(last), activation);
        if (has_factor)
            y = y * V(load)(factors);
        V(store)(last, y);
        memcpy(x + i, last, (n - i) * sizeof(REAL));
    }
}

static void V(activate)(mha_activation activation, void *x, const void *factor, size_t n)
{
    switch (activation) {
#define CASE(name) \
    case name: \
        if (factor) \
            V(activate_all)(x, factor, n, name, true); \
        else \
            V(activate_all)(x, NULL, n, name, false); \
        break;
        CASE(MHA_RELU)
        CASE(MHA_GELU)
        CASE(MHA_GELU_TANH)
        CASE(MHA_SILU)
        CASE(MHA_QUICK_GELU)
#undef CASE
    }
}
