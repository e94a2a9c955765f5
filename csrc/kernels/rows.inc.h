/* SPDX-License-Identifier: Apache-2.0
 *
 * rows.inc.h - sums, constants, checks and dropout of rows of numbers (kernels.inc.h includes it).
 */

static void V(add)(void *sum_, const void *a_, const void *b_, size_t n)
{
    REAL *sum = sum_;
    const REAL *a = a_, *b = b_;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        V(store)(sum + i, V(load)(a + i) + V(load)(b + i));
    for (; i < n; i++)
        sum[i] = a[i] + b[i];
}

static void V(fill)(void *x_, size_t n, double value)
{
    REAL *x = x_;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        V(store)(x + i, V(splat)((REAL)value));
    for (; i < n; i++)
        x[i] = (REAL)value;
}

/* A number times 0 is 0 or NaN, and NaN stays in a sum. Four sums wait less for each other. */
static bool V(is_finite)(const void *x_, size_t n)
{
    const REAL *x = x_;
    const VEC zero = V(splat)(0);
    VEC sums[] = {zero, zero, zero, zero};
    size_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        MHA_UNROLL
        for (size_t sum = 0; sum < 4; sum++)
            sums[sum] = V(fma)(V(load)(x + i + sum * LANES), zero, sums[sum]);
    }
    REAL total[V(lanes)], rest = 0;
    V(store)(total, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < n; i++)
        rest += x[i] * 0;
    for (size_t lane = 0; lane < LANES; lane++)
        rest += total[lane];
    return rest == 0;
}

static void V(dropout)(void *probabilities_, size_t keys, size_t vectors, size_t count, const mha_dropout_block *block)
{
    REAL *probabilities = probabilities_;
    const size_t P = vectors * LANES;
    const REAL kept = (REAL)block->scale;
    for (size_t lane = 0; lane < count; lane++) {
        mha_philox_block random = {{0}};
        size_t held = SIZE_MAX; /* the group of four keys of `random` */
        for (size_t i = 0; i < keys; i++) {
            const size_t s = block->index ? block->index[i] : block->first_key + i;
            if (s / 4 != held) {
                held = s / 4;
                random = mha_philox(block->key, block->n, block->h, block->first_query + lane, held);
            }
            probabilities[i * P + lane] *= random.word[s % 4] < block->threshold ? kept : 0;
        }
    }
}
