/* SPDX-License-Identifier: Apache-2.0
 *
 * activations.inc.h - what a feed-forward network does to each number (kernels.inc.h includes it).
 *
 * Where a function subtracts numbers that are nearly equal, the difference is small beside what it is added to. So its
 * relative error is small for every x, also where results are near 0.
 */

#ifndef MHA_ACTIVATIONS_INC_H
#define MHA_ACTIVATIONS_INC_H

/* The probability that a standard normal number is above t >= 0 is (1 - w) p(w) exp(-t^2 / 2), where w = t / (TAIL + t)
 * is between 0 and 1. The polynomials p are minimax in the relative error, which is 2^-24.5 for t up to 13.5, and
 * 2^-56.2 for t up to 38 (Remez' algorithm). TAIL makes it small. Above LAST_TAIL, the exponential is 0. */
#define TAIL_f32 3.0f
#define TAIL_f64 5.0
#define LAST_TAIL_f32 16.0f
#define LAST_TAIL_f64 40.0
static const float tail_coefficients_f32[] = {
    -0x1.7a61b6p-6f, 0x1.b7082ep-5f, -0x1.808d42p-9f, -0x1.2f1be2p-5f, -0x1.5f8226p-4f,
    0x1.19201ap-4f,  0x1.6cf4bap-2f, -0x1.64c6d6p-1f, 0x1.000000p-1f,
};
static const double tail_coefficients_f64[] = {
    0x1.c1361cdf1579ep-11, -0x1.e9f2f4ffdef2bp-8, 0x1.d646a137e87a2p-6,  -0x1.03e2ac8068d35p-4, 0x1.706d03982c0dbp-4,
    -0x1.6f52b30009d38p-4, 0x1.22f4be7fa6068p-4,  -0x1.625676e0db040p-5, 0x1.25d804220674ep-7,  -0x1.c1fbbebc1b585p-10,
    0x1.cfd354bae3b80p-6,  0x1.1b81ac3de8426p-9,  -0x1.6010843cef2c8p-4, -0x1.ac56691aa47f2p-7, 0x1.35542d049d938p-2,
    -0x1.3368db875c10bp-3, -0x1.fffdad7bed2a8p-1, 0x1.4bf069c26ad1ep+1,  -0x1.ada94d9cb37e2p+1, 0x1.615a97f36c25ep+1,
    -0x1.7ea5680c943fbp+0, 0x1.0000000000000p-1,
};

#endif

INLINE VEC V(minus)(VEC x)
{
    return V(splat)(0) - x;
}

/* -factor |x|, but not below `lowest`; of 0 it is -0, so that -0 stays -0 in what follows, as in torch. */
INLINE VEC V(minus_magnitude)(VEC x, REAL factor, REAL lowest)
{
    return V(max)(V(splat)(-factor) * V(max)(x, V(minus)(x)), V(splat)(lowest));
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
    const VEC minus_t = V(minus_magnitude)(x, 1, -V(LAST_TAIL));
    const VEC w = minus_t / (minus_t - V(splat)(V(TAIL)));
    VEC p = V(splat)(V(tail_coefficients)[0]);
    MHA_UNROLL
    for (size_t c = 1; c < sizeof V(tail_coefficients) / sizeof(REAL); c++)
        p = V(fma)(p, w, V(splat)(V(tail_coefficients)[c]));
    const VEC beyond = V(fma)(V(minus)(w), p, p) * V(exp)(minus_t * minus_t * V(splat)((REAL)-0.5));
    return V(fma)(minus_t, beyond, V(relu)(x));
}

/* x / (1 + exp(-a x)), where a > 0: the positive part of x, less |x| q, where q = e / (1 + e) and e = exp(-a |x|).
 *
 * 2 q is e + e (1 - e) / (1 + e). Near x = 0, e is near 1, and the quotient is small. So errors of 1 + e and of the
 * division are small, too, and the rounding of the sum remains. */
INLINE VEC V(times_sigmoid)(VEC x, VEC twice_a)
{
    const VEC half = V(minus_magnitude)(x, (REAL)0.5, V(LOWEST)), one = V(splat)(1);
    const VEC e = V(exp)(half * twice_a);
    return V(fma)(half, V(fma)(e, (one - e) / (one + e), e), V(relu)(x));
}

/* x (1 + tanh(u)) / 2 is x / (1 + exp(-2 u)), where u = sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE VEC V(gelu_tanh)(VEC x)
{
    const VEC linear = V(splat)((REAL)0x1.9884533d43651p+1), cubic = V(splat)((REAL)0x1.2444f2a4d8b4bp-3);
    return V(times_sigmoid)(x, V(fma)(x * x, cubic, linear));
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
        return V(times_sigmoid)(x, V(splat)(2));
    case MHA_QUICK_GELU:
        return V(times_sigmoid)(x, V(splat)(2 * (REAL)1.702));
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
