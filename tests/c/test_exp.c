/* SPDX-License-Identifier: Apache-2.0
 *
 * test_exp.c - how accurate exp(x) is, for x <= 0: "less than 1.125 ulp, and |x| / 20 for what ln(2) is rounded by,
 * where x is at least -126 ln(2), exactly 0 below, NaN stays NaN" (float64: 0.75, |x| / 3, -1022 ln(2)).
 *
 *     ./test_exp            a sample of all float32, a sample of float64
 *     ./test_exp every      and every float32 in [-128, 0], by the levels with FMA
 *
 * softmax_probabilities() with maximum 0 and sum 1 is exp(x). The portable level has no FMA, so that what rounding does
 * to a multiple of ln(2) stays: about |x| ulp more. The sample's hash is printed: it must be the same on every CPU with
 * FMA.
 */
#include "bench.h"

static const long double ln_2 = 0.6931471805599453094172L;

enum { BLOCK = 1 << 14, MAX_LEVELS = 8, STRIDE = 1009, SAMPLES = 1 << 17, PANEL_ROWS = 64 };

/* x[i] = exp(x[i]) for i < BLOCK. */
static void exp_of(const mha_kernels *k, void *x)
{
    char *row = x;
    double zero[8] = {0}, one[8]; /* a vector of either dtype */
    for (size_t i = 0; i < k->lanes; i++)
        put(k->dtype, one, (ptrdiff_t)i, 1);
    const size_t bytes = PANEL_ROWS * k->lanes * k->size;
    for (; row < (char *)x + BLOCK * k->size; row += bytes)
        k->softmax_probabilities(row, PANEL_ROWS, 1, zero, one);
}

/* ---- float32 ---- */

static float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The distance of p from exp(x) in units of the last place of exp(x). */
static double ulps_f32(float p, float x)
{
    /* Most floats are tiny. For those the series is quick, and exact enough: the fourth term is below 2^-44. */
    const double u = (double)x;
    const double wanted = x > -0x1p-10f ? 1 + u * (1 + u * (0.5 + u * (1 / 6.0))) : exp(u);
    uint64_t bits;
    memcpy(&bits, &wanted, sizeof bits);
    bits = (bits & 0x7ff0000000000000u) - ((uint64_t)23 << 52); /* the power of two at or below, times 2^-23 */
    double ulp;
    memcpy(&ulp, &bits, sizeof ulp);
    return fabs((double)p - wanted) / ulp;
}

/* A level's worst result so far, beyond what |x| explains. Levels with FMA give the same bits, so that only the first
 * of them is measured. */
typedef struct {
    const mha_kernels *kernels;
    double ulps, x;
} level;

static level levels[MAX_LEVELS];
static size_t level_count;

static bool has_fma(const level *l)
{
    return strcmp(l->kernels->name, "portable") != 0;
}

/* How many |x| make a unit of what ln(2) is rounded by. */
static double share_of_x(mha_dtype dtype)
{
    return dtype == MHA_FLOAT32 ? 20 : 3;
}

static void remember(level *l, double ulps, double x)
{
    const double beyond = ulps - fabs(x) / share_of_x(l->kernels->dtype) - (has_fma(l) ? 0 : fabs(x));
    if (!(beyond <= l->ulps)) { /* NaN, too */
        l->ulps = beyond;
        l->x = x;
    }
}

static void measure_f32(level *l, const void *x_, const void *p_)
{
    const float *x = x_, *p = p_;
    for (size_t i = 0; i < BLOCK; i++) {
        if ((long double)x[i] >= -126 * ln_2)
            remember(l, ulps_f32(p[i], x[i]), (double)x[i]);
        else if (p[i] != 0)
            CHECK(p[i] == 0, "%s: exp(%a) is %a", l->kernels->name, (double)x[i], (double)p[i]);
    }
}

/* ---- float64 ---- */

/* long double has more bits than double on x86-64 and on Linux for aarch64; elsewhere the bound is half a unit off. */
static const double bound_f64 = LDBL_MANT_DIG > DBL_MANT_DIG ? 0.75 : 1.25;

static void measure_f64(level *l, const void *x_, const void *p_)
{
    const double *x = x_, *p = p_;
    for (size_t i = 0; i < BLOCK; i++) {
        if ((long double)x[i] < -1022 * ln_2) {
            CHECK(p[i] == 0, "%s: exp(%a) is %a", l->kernels->name, x[i], p[i]);
            continue;
        }
        const long double wanted = expl((long double)x[i]);
        int exponent;
        frexpl(wanted, &exponent);
        remember(l, (double)ldexpl(fabsl((long double)p[i] - wanted), DBL_MANT_DIG - exponent), x[i]);
    }
}

/* ---- All levels ---- */

/* Runs every level on the same numbers; what the first one with FMA makes of them replaces x[]. */
static void run_block(mha_dtype dtype, void *x)
{
    static double first[BLOCK], p[BLOCK];
    const size_t bytes = BLOCK * mha_size_of(dtype);
    bool has_first = false;
    for (size_t i = 0; i < level_count; i++) {
        memcpy(p, x, bytes);
        exp_of(levels[i].kernels, p);
        if (has_fma(&levels[i]) && has_first) {
            CHECK(memcmp(p, first, bytes) == 0, "%s: other bits somewhere after exp(%a)", levels[i].kernels->name,
                  get(dtype, x, 0));
            continue;
        }
        (dtype == MHA_FLOAT32 ? measure_f32 : measure_f64)(&levels[i], x, p);
        if (has_fma(&levels[i])) {
            memcpy(first, p, bytes);
            has_first = true;
        }
    }
    if (has_first)
        memcpy(x, first, bytes);
}

static void begin(mha_dtype dtype, bool with_portable)
{
    level_count = 0;
    for (size_t i = 0; mha_cpu_supported(i); i++) {
        levels[level_count] = (level){.kernels = mha_cpu_kernels_named(mha_cpu_supported(i), dtype)};
        level_count += with_portable || has_fma(&levels[level_count]);
    }
}

static void report(mha_dtype dtype, double bound)
{
    for (size_t i = 0; i < level_count; i++) {
        const level *l = &levels[i];
        if (l->x != 0)
            printf("exp %s %s: at most %.4f ulp beyond |x| / %g%s, at %a\n", dtype_name(dtype), l->kernels->name,
                   l->ulps, share_of_x(dtype), has_fma(l) ? "" : " + |x|", l->x);
        CHECK(l->ulps <= bound, "%s: exp(%a) is %g ulp beyond the bound", l->kernels->name, l->x, l->ulps);
    }
}

/* Some values that a sample may miss, both sides of where exp becomes 0 among them. */
static const double special[] = {0,        -0.0,      -INFINITY, -FLT_MAX, -FLT_MIN, -1,     -0x1p-149, -87.336544,
                                 -87.3366, -87.33655, -88,       -104,     -708.396, -708.4, -745,      -1e300};
enum { SPECIAL = sizeof special / sizeof *special };

static double sample_f64(size_t i)
{
    const double u = random_number(MHA_FLOAT64, 1, i);
    if (i < SPECIAL)
        return special[i];
    return i % 2 ? -fabs(u) * 710 : -ldexp(fabs(u), -(int)(i % 64)); /* evenly, and ever closer to 0 */
}

static void test_f64(size_t samples)
{
    static double x[BLOCK];
    uint64_t hash = HASH_OF_NOTHING;
    begin(MHA_FLOAT64, true);
    for (size_t done = 0; done < samples; done += BLOCK) {
        for (size_t i = 0; i < BLOCK; i++)
            x[i] = sample_f64(done + i);
        run_block(MHA_FLOAT64, x);
        for (size_t i = 0; i < BLOCK; i++)
            hash_number(&hash, x[i]);
    }
    report(MHA_FLOAT64, bound_f64);
    printf("hash exp float64 %016llx\n", (unsigned long long)hash);
}

/* Of the magnitudes of float32, the bits are whole numbers in order; `stride` is 1 or prime. */
static void test_f32(uint32_t stride)
{
    static float x[BLOCK];
    const uint64_t magnitudes = (stride > 1 ? 0x7f800000 : 0x43000000) + 1; /* up to infinity, up to 128 */
    uint64_t hash = HASH_OF_NOTHING;
    begin(MHA_FLOAT32, stride > 1);
    for (uint64_t bits = 0; bits < magnitudes; bits += BLOCK * (uint64_t)stride) {
        for (uint64_t i = 0; i < BLOCK; i++)
            x[i] = bits + i * stride < magnitudes ? -float_of((uint32_t)(bits + i * stride)) : 0;
        run_block(MHA_FLOAT32, x);
        for (size_t i = 0; stride > 1 && i < BLOCK; i++)
            hash_number(&hash, (double)x[i]);
    }
    report(MHA_FLOAT32, 1.125);
    if (stride > 1)
        printf("hash exp float32 %016llx\n", (unsigned long long)hash);
}

/* NaN of either sign stays NaN, wherever it stands in a vector. */
static void test_nan(mha_dtype dtype)
{
    static double x[BLOCK];
    begin(dtype, true);
    for (size_t l = 0; l < level_count; l++) {
        for (size_t i = 0; i < BLOCK; i++)
            put(dtype, x, (ptrdiff_t)i, i % 3 ? -1 : i % 2 ? NAN : -NAN);
        exp_of(levels[l].kernels, x);
        for (size_t i = 0; i < BLOCK; i++)
            CHECK(isnan(get(dtype, x, (ptrdiff_t)i)) == (i % 3 == 0), "%s: NaN at %zu", levels[l].kernels->name, i);
    }
}

int main(int argc, char **argv)
{
    const bool every = argc > 1 && strcmp(argv[1], "every") == 0;
    test_nan(MHA_FLOAT32);
    test_nan(MHA_FLOAT64);
    test_f64(SAMPLES);
    test_f32(STRIDE);
    if (every)
        test_f32(1);
    return check_report("test_exp");
}
