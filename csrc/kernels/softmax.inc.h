/* SPDX-License-Identifier: Apache-2.0
 *
 * softmax.inc.h - the exponential function, and softmax step by step (kernels.inc.h includes it).
 */

#ifndef MHA_SOFTMAX_INC_H
#define MHA_SOFTMAX_INC_H

enum { EXP_VECTORS = 4, EXP_AT_ONCE = REGISTERS / 8 /* vectors that fit into the registers */ };

_Static_assert(EXP_VECTORS == 4, "sum_of_exps() adds up four sums");

/* See exp_of_each(). POWERS: steps between two powers of two. ROUND: 1.5 * 2^mantissa bits + POWERS * exponent bias.
 * EXP_LOWEST: the last number above -126 ln(2), for double -1022 ln(2). */
#define LOG2_E_f32 0x1.715476p+0f
#define LOG2_E_f64 0x1.71547652b82fep+0
#define LN_2_f32 0x1.62e430p-1f
#define LN_2_f64 0x1.62e42fefa39efp-1
#define POWERS_f32 8
#define POWERS_f64 1
#define EXP_LOWEST_f32 (-0x1.5d589ep+6f)
#define EXP_LOWEST_f64 (-0x1.6232bdd7abcd2p+9)
#define ROUND_f32 (12582912.0f + POWERS_f32 * 127)
#define ROUND_f64 (6755399441055744.0 + POWERS_f64 * 1023)
static const float exp_coefficients_f32[] = {0x1.555658p-3f, 0x1.00087cp-1f};
static const double exp_coefficients_f64[] = {
    0x1.ad596ce39e990p-26, 0x1.28af9b7a144e9p-22, 0x1.71df48d2f650dp-19, 0x1.a01997577efedp-16, 0x1.a01a0111c74b3p-13,
    0x1.6c16c1855d582p-10, 0x1.111111112f93ep-7,  0x1.5555555550197p-5,  0x1.55555555554bap-3,  0x1.000000000000bp-1,
};

#endif

/* exp(x) for x <= 0, computed as 2^(k / POWERS) (1 + s), where s = exp(r) - 1, k / POWERS ln(2) + r = x and |r| <=
 * ln(2) / (2 POWERS). It is 0 for x < EXP_LOWEST. NaN stays NaN.
 *
 * The error is less than 1.125 ulp for float (1.122 over all of them) and 0.75 ulp for double, plus the effect of
 * rounding ln(2), which grows with |x|: at most |x| / 20 ulp for float and |x| / 3 ulp for double. Subtracting the
 * maximum has already introduced a larger error, up to |x|.
 *
 * Adding ROUND leaves k, biased as exponents are, in the low bits of the sum. The eight powers of float are looked up
 * by units that are idle, unlike those that multiply and add. AVX2 cannot look up eight powers of double at once. s is
 * r + r^2 times a polynomial, which is minimax in the relative error of the result (Remez' algorithm). */
INLINE void V(exp_of_each)(VEC x[], const size_t count)
{
    VEC rounded[EXP_AT_ONCE], r[EXP_AT_ONCE], s[EXP_AT_ONCE];
    const VEC round = V(splat)(V(ROUND));
    MHA_UNROLL
    for (size_t i = 0; i < count; i++)
        rounded[i] = V(fma)(x[i], V(splat)(V(POWERS) * V(LOG2_E)), round);
    MHA_UNROLL
    for (size_t i = 0; i < count; i++)
        r[i] = V(fma)(round - rounded[i], V(splat)(V(LN_2) / V(POWERS)), x[i]);
    MHA_UNROLL
    for (size_t i = 0; i < count; i++)
        s[i] = V(splat)(V(exp_coefficients)[0]);
    MHA_UNROLL
    for (size_t c = 1; c < sizeof V(exp_coefficients) / sizeof(REAL); c++) {
        MHA_UNROLL
        for (size_t i = 0; i < count; i++)
            s[i] = V(fma)(s[i], r[i], V(splat)(V(exp_coefficients)[c]));
    }
    MHA_UNROLL
    for (size_t i = 0; i < count; i++)
        s[i] = V(fma)(s[i], r[i] * r[i], r[i]);
    MHA_UNROLL
    for (size_t i = 0; i < count; i++) {
        const VEC power = V(power)(rounded[i]);
        x[i] = V(zero_below)(V(fma)(power, s[i], power), x[i], V(splat)(V(EXP_LOWEST)));
    }
}

INLINE VEC V(exp)(VEC x)
{
    V(exp_of_each)(&x, 1);
    return x;
}

static void V(softmax_begin)(void *maximum_, void *sum_, size_t vectors)
{
    REAL *maximum = maximum_, *sum = sum_;
    for (size_t lane = 0; lane < vectors * LANES; lane += LANES) {
        /* not -inf: a row that sees no key must not compute -inf - -inf */
        V(store)(maximum + lane, V(splat)(V(LOWEST)));
        V(store)(sum + lane, V(splat)(0));
    }
}

/* p[i] = exp(score of key i - maximum) for `count` keys, at most EXP_VECTORS. */
INLINE void V(exp_of_scores)(const REAL *scores, size_t P, VEC maximum, VEC p[], const size_t count)
{
    MHA_UNROLL
    for (size_t i = 0; i < count; i++)
        p[i] = V(load)(scores + i * P) - maximum;
    MHA_UNROLL
    for (size_t i = 0; i < count; i += EXP_AT_ONCE)
        V(exp_of_each)(p + i, count - i < EXP_AT_ONCE ? count - i : EXP_AT_ONCE);
}

/* The same, stored, and each added to a sum of its own. */
INLINE void V(sum_up)(const REAL *scores, size_t P, VEC maximum, REAL *exps, VEC sums[EXP_VECTORS], const size_t count)
{
    VEC p[EXP_VECTORS];
    V(exp_of_scores)(scores, P, maximum, p, count);
    MHA_UNROLL
    for (size_t i = 0; i < count; i++) {
        V(store)(exps + i * P, p[i]);
        sums[i] = sums[i] + p[i];
    }
}

/* The same in place, divided by the sum. */
INLINE void V(probabilities_of)(REAL *scores, size_t P, VEC maximum, VEC sum, const size_t count)
{
    VEC p[EXP_VECTORS];
    V(exp_of_scores)(scores, P, maximum, p, count);
    MHA_UNROLL
    for (size_t i = 0; i < count; i++)
        V(store)(scores + i * P, p[i] / sum);
}

/* The largest of the keys' scores and of `so_far`. There are two chains, which wait less for each other. */
INLINE VEC V(largest)(const REAL *scores, size_t keys, size_t P, VEC so_far)
{
    VEC even = so_far, odd = so_far;
    size_t i = 0;
    for (; i + 4 <= keys; i += 4) {
        even = V(max)(even, V(max)(V(load)(scores + i * P), V(load)(scores + (i + 2) * P)));
        odd = V(max)(odd, V(max)(V(load)(scores + (i + 1) * P), V(load)(scores + (i + 3) * P)));
    }
    for (; i < keys; i++)
        even = V(max)(even, V(load)(scores + i * P));
    return V(max)(even, odd);
}

/* exps[i] = exp(score of key i - maximum), and their sum. Four short sums have a smaller error than a long one. */
INLINE VEC V(sum_of_exps)(const REAL *scores, size_t keys, size_t P, VEC maximum, REAL *exps)
{
    VEC sums[EXP_VECTORS] = {V(splat)(0), V(splat)(0), V(splat)(0), V(splat)(0)};
    size_t i = 0;
    for (; i + EXP_VECTORS <= keys; i += EXP_VECTORS)
        V(sum_up)(scores + i * P, P, maximum, exps + i * P, sums, EXP_VECTORS);
    MHA_UNROLL
    for (size_t rest = 1; rest < EXP_VECTORS; rest++)
        if (rest == keys - i)
            V(sum_up)(scores + i * P, P, maximum, exps + i * P, sums, rest);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

static void V(softmax_step)(const void *scores_, size_t keys, size_t vectors, void *exps_, void *maximum_, void *sum_,
                            void *factor_)
{
    const size_t P = vectors * LANES;
    for (size_t lane = 0; lane < P; lane += LANES) {
        const REAL *scores = (const REAL *)scores_ + lane;
        REAL *exps = (REAL *)exps_ + lane, *maximum = (REAL *)maximum_ + lane;
        REAL *sum = (REAL *)sum_ + lane, *factor = (REAL *)factor_ + lane;
        const VEC old = V(load)(maximum);
        const VEC new = V(largest)(scores, keys, P, old);
        const VEC block_sum = V(sum_of_exps)(scores, keys, P, new, exps);
        const VEC rescale = V(exp)(old - new);
        V(store)(sum, V(fma)(V(load)(sum), rescale, block_sum));
        V(store)(maximum, new);
        V(store)(factor, rescale);
    }
}

static void V(softmax_merge)(void *sums_, void *maximum_, void *sum_, const void *sums_2_, const void *maximum_2_,
                             const void *sum_2_, size_t width, size_t vectors)
{
    const size_t P = vectors * LANES;
    for (size_t lane = 0; lane < P; lane += LANES) {
        REAL *sums = (REAL *)sums_ + lane, *maximum = (REAL *)maximum_ + lane, *sum = (REAL *)sum_ + lane;
        const REAL *sums_2 = (const REAL *)sums_2_ + lane;
        const VEC old = V(load)(maximum), old_2 = V(load)((const REAL *)maximum_2_ + lane);
        const VEC new = V(max)(old, old_2);
        const VEC factor = V(exp)(old - new), factor_2 = V(exp)(old_2 - new);
        for (size_t d = 0; d < width; d++)
            V(store)(sums + d * P, V(fma)(V(load)(sums + d * P), factor, V(load)(sums_2 + d * P) * factor_2));
        V(store)(sum, V(fma)(V(load)(sum), factor, V(load)((const REAL *)sum_2_ + lane) * factor_2));
        V(store)(maximum, new);
    }
}

static void V(softmax_probabilities)(void *scores_, size_t keys, size_t vectors, const void *maximum_, const void *sum_)
{
    const size_t P = vectors * LANES;
    for (size_t lane = 0; lane < P; lane += LANES) {
        REAL *scores = (REAL *)scores_ + lane;
        const VEC maximum = V(load)((const REAL *)maximum_ + lane), sum = V(load)((const REAL *)sum_ + lane);
        size_t i = 0;
        for (; i + EXP_VECTORS <= keys; i += EXP_VECTORS)
            V(probabilities_of)(scores + i * P, P, maximum, sum, EXP_VECTORS);
        for (; i < keys; i++)
            V(probabilities_of)(scores + i * P, P, maximum, sum, 1);
    }
}

static void V(softmax_end)(void *sum_, void *inverse_, size_t vectors, mha_empty_row empty_row)
{
    const REAL of_nothing = empty_row == MHA_EMPTY_ROW_NAN ? (REAL)NAN : 1;
    REAL *sum = sum_, *inverse = inverse_;
    for (size_t lane = 0; lane < vectors * LANES; lane++)
        if (sum[lane] == 0)
            sum[lane] = of_nothing;
    for (size_t lane = 0; lane < vectors * LANES; lane += LANES)
        V(store)(inverse + lane, V(splat)(1) / V(load)(sum + lane));
}
