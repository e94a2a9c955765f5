/* SPDX-License-Identifier: Apache-2.0
 *
 * norm.inc.h - rows normalized by their own mean and variance (kernels.inc.h includes it).
 *
 * A sum over a row is NORM_SUMS interleaved sums, whatever the width of a vector. They are made of chains that start at
 * zero, cover MHA_CHAIN steps and are added in order. In the end they are folded in halves. So all instruction sets add
 * the same numbers in the same order.
 */

#ifndef MHA_NORM_INC_H
#define MHA_NORM_INC_H

enum { NORM_SUMS = 2 * MHA_MAX_VECTOR_LANES };

#endif

#define NORM_VECTORS (NORM_SUMS / LANES)

/* What a row is normalized by: y = (x - mean) * scale + shift, and shift is not read if the norm is RMS. */
typedef struct {
    REAL mean, scale, shift;
} V(moments);

typedef struct {
    double sum, squares;
} V(row_sums);

/* Adds NORM_SUMS numbers to as many sums, and their squares to others. The flags are constants in every copy. */
INLINE void V(add_step)(const REAL *x, VEC mean, const bool wants_sum, const bool wants_squares, VEC sums[],
                        VEC squares[])
{
    MHA_UNROLL
    for (size_t v = 0; v < NORM_VECTORS; v++) {
        const VEC difference = V(load)(x + v * LANES) - mean;
        if (wants_sum)
            sums[v] = sums[v] + difference;
        if (wants_squares)
            squares[v] = V(fma)(difference, difference, squares[v]);
    }
}

INLINE double V(fold)(VEC sums[])
{
    REAL lanes[V(lanes)];
    MHA_UNROLL
    for (size_t half = NORM_VECTORS / 2; half > 0; half /= 2)
        MHA_UNROLL
        for (size_t v = 0; v < half; v++)
            sums[v] = sums[v] + sums[v + half];
    V(store)(lanes, sums[0]);
    MHA_UNROLL
    for (size_t half = LANES / 2; half > 0; half /= 2)
        MHA_UNROLL
        for (size_t lane = 0; lane < half; lane++)
            lanes[lane] += lanes[lane + half];
    return (double)lanes[0];
}

/* The sum of x[i] - mean, and of its square, where they are wanted. The rest of a width that is not whole steps is
 * filled up with the mean, which adds zeros. */
INLINE V(row_sums) V(sum_row)(const REAL *x, size_t width, REAL mean, const bool wants_sum, const bool wants_squares)
{
    const VEC means = V(splat)(mean);
    VEC sums[NORM_VECTORS], squares[NORM_VECTORS];
    MHA_UNROLL
    for (size_t v = 0; v < NORM_VECTORS; v++)
        sums[v] = squares[v] = V(splat)(0);
    for (size_t i = 0; i < width;) {
        const size_t end = mha_smaller(width, i + MHA_CHAIN * NORM_SUMS);
        VEC chain[NORM_VECTORS], chain_of_squares[NORM_VECTORS];
        MHA_UNROLL
        for (size_t v = 0; v < NORM_VECTORS; v++)
            chain[v] = chain_of_squares[v] = V(splat)(0);
        for (; i + NORM_SUMS <= end; i += NORM_SUMS)
            V(add_step)(x + i, means, wants_sum, wants_squares, chain, chain_of_squares);
        if (i < end) {
            REAL rest[NORM_SUMS];
            for (size_t j = 0; j < NORM_SUMS; j++)
                rest[j] = i + j < end ? x[i + j] : mean;
            V(add_step)(rest, means, wants_sum, wants_squares, chain, chain_of_squares);
            i = end;
        }
        MHA_UNROLL
        for (size_t v = 0; v < NORM_VECTORS; v++) {
            sums[v] = sums[v] + chain[v];
            squares[v] = squares[v] + chain_of_squares[v];
        }
    }
    return (V(row_sums)){wants_sum ? V(fold)(sums) : 0, wants_squares ? V(fold)(squares) : 0};
}

/* 1 / sqrt(x), and one step of Newton's method, which corrects what the root and the quotient were rounded by. Where x
 * is 0 or not finite, the first estimate stays. */
INLINE double V(inverse_root)(double x)
{
    const double y = 1 / sqrt(x), product = x * y;
    const double residue = fma(-product, y, 1) - fma(x, y, -product) * y; /* of x y^2 = 1 */
    const double corrected = fma(y, residue / 2, y);
    return isfinite(corrected) ? corrected : y;
}

/* What is computed once for a row is computed in double. A mean is rounded to a REAL. The mean of the differences from
 * it is its error ("Algorithms for computing the sample variance", Chan, Golub and LeVeque, 1983). It corrects the
 * variance and the result, so that a mean far from zero costs no accuracy. */
INLINE V(moments) V(moments_of)(const REAL *x, size_t width, double eps, const bool is_rms)
{
    const double n = (double)width;
    if (is_rms) {
        const double square = V(sum_row)(x, width, 0, false, true).squares / n;
        return (V(moments)){0, (REAL)V(inverse_root)(square + eps), 0};
    }
    const REAL mean = (REAL)(V(sum_row)(x, width, 0, true, false).sum / n);
    const V(row_sums) left = V(sum_row)(x, width, mean, true, true);
    const double error = left.sum / n, rounded = left.squares / n - error * error;
    const double variance = rounded < 0 ? 0 : rounded; /* NaN stays */
    const double scale = V(inverse_root)(variance + eps);
    return (V(moments)){mean, (REAL)scale, (REAL)(-error * scale)};
}

INLINE VEC V(normal)(VEC x, const V(moments) *m, VEC weight, VEC bias, const bool is_rms, const bool has_weight,
                     const bool has_bias)
{
    const VEC scale = V(splat)(m->scale);
    if (is_rms)
        x = x * scale;
    else
        x = V(fma)(x - V(splat)(m->mean), scale, V(splat)(m->shift));
    if (has_weight && has_bias)
        return V(fma)(x, weight, bias);
    if (has_weight)
        return x * weight;
    if (has_bias)
        return x + bias;
    return x;
}

/* The flags are constants in every copy. */
INLINE void V(write_row)(const mha_norm_rows *rows, const REAL *x, REAL *y, const V(moments) *m, const bool is_rms,
                         const bool has_weight, const bool has_bias)
{
    const REAL *weight = rows->norm.weight, *bias = rows->norm.bias;
    const size_t width = rows->width;
    const VEC zero = V(splat)(0);
    size_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        const VEC w = has_weight ? V(load)(weight + i) : zero, b = has_bias ? V(load)(bias + i) : zero;
        V(store)(y + i, V(normal)(V(load)(x + i), m, w, b, is_rms, has_weight, has_bias));
    }
    if (i < width) {
        const size_t bytes = (width - i) * sizeof(REAL);
        REAL last[V(lanes)] = {0}, w[V(lanes)] = {0}, b[V(lanes)] = {0};
        memcpy(last, x + i, bytes);
        if (has_weight)
            memcpy(w, weight + i, bytes);
        if (has_bias)
            memcpy(b, bias + i, bytes);
        V(store)(last, V(normal)(V(load)(last), m, V(load)(w), V(load)(b), is_rms, has_weight, has_bias));
        memcpy(y + i, last, bytes);
    }
}

/* All rows, by the copy of write_row() that the parameters ask for. */
INLINE void V(normalize_rows)(const mha_norm_rows *rows, const bool is_rms)
{
    const mha_norm *norm = &rows->norm;
    const REAL *x = rows->x;
    REAL *y = rows->y;
    for (size_t row = 0; row < rows->rows; row++, x += rows->x_row, y += rows->y_row) {
        const V(moments) m = V(moments_of)(x, rows->width, norm->eps, is_rms);
        if (norm->weight && norm->bias)
            V(write_row)(rows, x, y, &m, is_rms, true, true);
        else if (norm->weight)
            V(write_row)(rows, x, y, &m, is_rms, true, false);
        else if (norm->bias)
            V(write_row)(rows, x, y, &m, is_rms, false, true);
        else
            V(write_row)(rows, x, y, &m, is_rms, false, false);
    }
}

static void V(normalize)(const mha_norm_rows *rows)
{
    if (rows->norm.is_rms)
        V(normalize_rows)(rows, true);
    else
        V(normalize_rows)(rows, false);
}

#undef NORM_VECTORS
