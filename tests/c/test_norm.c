/* SPDX-License-Identifier: Apache-2.0
 *
 * test_norm.c - the norms of every table this CPU can run, against kernels.h.
 *
 * The order of additions that norm.inc.h describes is repeated here number by number: results must agree with it bit
 * for bit, also with the portable table, whose multiply-add rounds twice. They are held to the definition, too, in long
 * double. The hashes that are printed are those of tables with FMA, and can be compared with those of another CPU.
 */
#include "bench.h"

enum { SUMS = 32, MAX_WIDTH = 5000, MAX_ROWS = 3, MAX_NUMBERS = 8 * MAX_WIDTH };

typedef struct {
    size_t width;
    double center; /* numbers are in [center - 1, center + 1) */
    double eps;
    bool is_rms, has_weight, has_bias, in_place;
} norm_case;

static const size_t widths[] = {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 768, 2048, 2049, 4159};
static const double centers[] = {0, 3, -1000};

/* ---- The order of additions ---- */

static double multiply_add(const bench *b, double x, double y, double z)
{
    return b->has_fma ? fused(b->dtype, x, y, z) : rounded(b->dtype, rounded(b->dtype, x * y) + z);
}

/* Interleaved sums of (x - mean) ^ power in chains of 64 steps, folded in halves. */
static double sum_in_order(const bench *b, const double *x, size_t width, double mean, int power)
{
    double sums[SUMS] = {0};
    for (size_t first = 0; first < width; first += 64 * SUMS) {
        double chain[SUMS] = {0};
        for (size_t i = first; i < width && i < first + 64 * SUMS; i++) {
            const double d = rounded(b->dtype, x[i] - mean);
            double *sum = &chain[i % SUMS];
            *sum = power == 1 ? rounded(b->dtype, *sum + d) : multiply_add(b, d, d, *sum);
        }
        for (size_t i = 0; i < SUMS; i++)
            sums[i] = rounded(b->dtype, sums[i] + chain[i]);
    }
    for (size_t half = SUMS / 2; half > 0; half /= 2)
        for (size_t i = 0; i < half; i++)
            sums[i] = rounded(b->dtype, sums[i] + sums[i + half]);
    return sums[0];
}

static double inverse_root(double x)
{
    const double y = 1 / sqrt(x), product = x * y;
    const double corrected = fma(y, (fma(-product, y, 1) - fma(x, y, -product) * y) / 2, y);
    return isfinite(corrected) ? corrected : y;
}

static void normalize_in_order(const bench *b, const norm_case *c, const double *x, const double *weight,
                               const double *bias, double *y)
{
    const double n = (double)c->width;
    double mean = 0, scale, shift = 0;
    if (c->is_rms) {
        scale = rounded(b->dtype, inverse_root(sum_in_order(b, x, c->width, 0, 2) / n + c->eps));
    } else {
        mean = rounded(b->dtype, sum_in_order(b, x, c->width, 0, 1) / n);
        const double error = sum_in_order(b, x, c->width, mean, 1) / n;
        const double variance = sum_in_order(b, x, c->width, mean, 2) / n - error * error;
        const double root = inverse_root((variance < 0 ? 0 : variance) + c->eps);
        scale = rounded(b->dtype, root);
        shift = rounded(b->dtype, -error * root);
    }
    for (size_t i = 0; i < c->width; i++) {
        y[i] = c->is_rms ? rounded(b->dtype, x[i] * scale)
                         : multiply_add(b, rounded(b->dtype, x[i] - mean), scale, shift);
        if (c->has_weight && c->has_bias)
            y[i] = multiply_add(b, y[i], weight[i], bias[i]);
        else if (c->has_weight)
            y[i] = rounded(b->dtype, y[i] * weight[i]);
        else if (c->has_bias)
            y[i] = rounded(b->dtype, y[i] + bias[i]);
    }
}

/* ---- The definition ---- */

static void check_definition(const bench *b, const norm_case *c, const double *x, const double *weight,
                             const double *bias, const double *y)
{
    const long double first = c->is_rms ? 0 : (long double)x[0]; /* numbers far from 0 are taken from there */
    long double mean = 0, square = 0;
    for (size_t i = 0; i < c->width && !c->is_rms; i++)
        mean += ((long double)x[i] - first) / (long double)c->width;
    for (size_t i = 0; i < c->width; i++)
        square += ((long double)x[i] - first - mean) * ((long double)x[i] - first - mean) / (long double)c->width;
    const long double root = sqrtl(square + (long double)c->eps);
    for (size_t i = 0; i < c->width; i++) {
        const long double normal = ((long double)x[i] - first - mean) / root;
        const long double w = c->has_weight ? (long double)weight[i] : 1, a = c->has_bias ? (long double)bias[i] : 0;
        const long double roundings = 4 * (1 + fabsl(normal)) * fabsl(w) + fabsl(a);
        const long double error = fabsl((long double)y[i] - (normal * w + a));
        CHECK(error <= roundings * (long double)eps_of(b->dtype), "number %zu is %a instead of %a", i, y[i],
              (double)(normal * w + a));
    }
}

/* ---- The kernel ---- */

static void fill(const bench *b, double *numbers, size_t count, double center, uint64_t seed)
{
    for (size_t i = 0; i < count; i++)
        numbers[i] = rounded(b->dtype, center + random_number(b->dtype, seed, i));
}

static void *copy_of(const bench *b, size_t slot, const double *numbers, size_t count)
{
    void *copy = buffer(b, slot, count);
    for (size_t i = 0; i < count; i++)
        put(b->dtype, copy, (ptrdiff_t)i, numbers[i]);
    return copy;
}

/* Rows that are `distance` apart, backwards if it is negative. The result goes to y [rows][width]. */
static void run_kernel(const bench *b, const norm_case *c, size_t rows, ptrdiff_t distance, const double *x,
                       const double *weight, const double *bias, double *y)
{
    const ptrdiff_t size = (ptrdiff_t)b->k->size, width = (ptrdiff_t)c->width, steps = (ptrdiff_t)rows - 1;
    const size_t apart = (size_t)(distance < 0 ? -distance : distance), room = (size_t)steps * apart + c->width;
    const ptrdiff_t first = distance < 0 ? -steps * distance : 0, y_row = c->in_place ? distance : width + 1;
    char *from = buffer(b, 0, room), *to = from;
    for (ptrdiff_t row = 0; row < (ptrdiff_t)rows; row++)
        for (ptrdiff_t i = 0; i < width; i++)
            put(b->dtype, from, first + row * distance + i, x[row * width + i]);
    if (!c->in_place)
        to = buffer(b, 1, (size_t)(steps * y_row + width));
    const ptrdiff_t first_y = c->in_place ? first : 0;
    const mha_norm_rows norm = {
        .rows = rows, .width = c->width, .x = from + first * size, .x_row = distance, .y = to + first_y * size,
        .y_row = y_row,
        .norm = {.weight = c->has_weight ? copy_of(b, 2, weight, c->width) : NULL,
                 .bias = c->has_bias ? copy_of(b, 3, bias, c->width) : NULL, .eps = c->eps, .is_rms = c->is_rms}};
    b->k->normalize(&norm);
    for (ptrdiff_t row = 0; row < (ptrdiff_t)rows; row++)
        for (ptrdiff_t i = 0; i < width; i++) {
            y[row * width + i] = get(b->dtype, to, first_y + row * y_row + i);
            CHECK(c->in_place || identical(get(b->dtype, from, first + row * distance + i), x[row * width + i]),
                  "row %td of x was changed", row);
        }
    for (size_t slot = 0; slot < 4; slot++)
        CHECK(!guarded_slots[slot].data || guarded_intact(slot), "wrote beside buffer %zu", slot);
    for (ptrdiff_t row = 0; !c->in_place && row < steps; row++)
        CHECK(isnan(get(b->dtype, to, row * y_row + width)), "wrote behind row %td", row);
}

static double x[MAX_NUMBERS], y[MAX_NUMBERS], weight[MAX_WIDTH], bias[MAX_WIDTH], wanted[MAX_WIDTH];

static void test_case(const bench *b, const norm_case *c, uint64_t *hash)
{
    const ptrdiff_t width = (ptrdiff_t)c->width, distances[] = {width, width + 3, -width - 1};
    DESCRIBE("%s %s %s of %zu numbers around %g%s%s%s", b->k->name, dtype_name(b->dtype), c->is_rms ? "rms" : "norm",
             c->width, c->center, c->has_weight ? ", weight" : "", c->has_bias ? ", bias" : "",
             c->in_place ? ", in place" : "");
    fill(b, x, MAX_ROWS * c->width, c->center, 1);
    fill(b, weight, c->width, 0, 2);
    fill(b, bias, c->width, 0, 3);
    for (size_t rows = 1; rows <= MAX_ROWS; rows++) {
        run_kernel(b, c, rows, distances[rows - 1], x, weight, bias, y);
        for (size_t row = 0; row < rows; row++) {
            normalize_in_order(b, c, x + row * c->width, weight, bias, wanted);
            for (size_t i = 0; i < c->width; i++)
                CHECK_SAME(y[row * c->width + i], wanted[i], row, i);
        }
    }
    check_definition(b, c, x, weight, bias, y);
    for (size_t i = 0; hash && i < MAX_ROWS * c->width; i++)
        hash_number(hash, y[i]);
}

/* Every case, on one table; hash NULL: none. */
static void test_table(const bench *b, uint64_t *hash)
{
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++)
        for (size_t j = 0; j < sizeof centers / sizeof *centers; j++)
            for (unsigned flags = 0; flags < 16; flags++) {
                const norm_case c = {widths[i], centers[j], j == 1 ? 1e-12 : 1e-5, flags & 1, flags & 2, flags & 4,
                                     flags & 8};
                test_case(b, &c, hash);
            }
}

/* ---- Numbers that are not finite, or not different ---- */

/* NaN, infinity and rows of one number: what torch gives, where the definition gives nothing. */
static void test_special_numbers(const bench *b)
{
    static const double specials[] = {NAN, INFINITY, -INFINITY};
    for (size_t width = 1; width < 70; width++)
        for (size_t at = 0; at < width; at += 3)
            for (size_t s = 0; s < 3; s++) {
                norm_case c = {.width = width, .eps = 1e-5};
                DESCRIBE("%s %s: %g at %zu of %zu", b->k->name, dtype_name(b->dtype), specials[s], at, width);
                fill(b, x, width, 0, 4);
                x[at] = specials[s];
                run_kernel(b, &c, 1, 0, x, weight, bias, y);
                for (size_t i = 0; i < width; i++)
                    CHECK(isnan(y[i]), "layer_norm: number %zu is %a", i, y[i]);
                c.is_rms = true;
                run_kernel(b, &c, 1, 0, x, weight, bias, y);
                for (size_t i = 0; i < width; i++)
                    CHECK(s == 0 || i == at ? isnan(y[i]) : y[i] == 0, "rms_norm: number %zu is %a", i, y[i]);
            }
    for (size_t width = 1; width < 70; width++) {
        const norm_case c = {.width = width, .eps = 1e-12};
        DESCRIBE("%s %s: %zu equal numbers", b->k->name, dtype_name(b->dtype), width);
        for (size_t i = 0; i < width; i++)
            x[i] = rounded(b->dtype, 0.1);
        run_kernel(b, &c, 1, 0, x, weight, bias, y);
        for (size_t i = 0; i < width; i++)
            CHECK(fabs(y[i]) < 1e-6, "number %zu is %a", i, y[i]);
    }
}

int main(void)
{
    for (int dtype = 0; dtype < 2; dtype++) {
        uint64_t hash = HASH_OF_NOTHING;
        bool is_hashed = false;
        for (size_t i = 0; mha_cpu_supported(i); i++)
            for (int side = 0; side < 2; side++) {
                const bench b = make_bench(mha_cpu_supported(i), (mha_dtype)dtype, 1, (guarded_side)side);
                test_table(&b, b.has_fma && !is_hashed ? &hash : NULL);
                is_hashed |= b.has_fma;
                test_special_numbers(&b);
            }
        printf("hash norm %s %016llx\n", dtype_name((mha_dtype)dtype), (unsigned long long)hash);
    }
    return check_report("test_norm");
}
