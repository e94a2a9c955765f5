/* SPDX-License-Identifier: Apache-2.0
 *
 * kernels.c - times the kernels of every instruction set of this CPU, one by one.
 *
 * Prints a line for each: level, the numbers that are multiplied, kernel, what it was given, nanoseconds a call,
 * operations a call (0 where a kernel moves or transforms numbers), numbers a call. Compiled and read by kernels.py.
 */
#include <stdio.h>
#include <stdlib.h>

#include "calls.h"
#include "cpu.h"
#include "stopwatch.h"
#include "workspace.h"

/* What a kernel is given: one struct for all, so that one loop times them all. */
typedef struct {
    const char *level, *multiplied;
    const mha_kernels *k;
    const mha_narrow_kernels *narrow; /* of narrow products */
    size_t rows, depth, vectors; /* of a product; rows are keys or features elsewhere */
    mha_product product;
    void *matrix, *panel, *result, *maximum, *sum, *factor; /* panel, result: [rows][P] or [depth][P] */
} bench;

static size_t lanes(const bench *b)
{
    return b->vectors * b->k->lanes;
}

static void run_product(const void *what)
{
    const bench *b = what;
    b->k->product(&b->product);
}

static void run_narrow_product(const void *what)
{
    const bench *b = what;
    b->narrow->product(&b->product);
}

/* The scores stay what the step before made of them, numbers in [0, 1]: no step is slower than another. */
static void run_softmax_step(const void *what)
{
    const bench *b = what;
    b->k->softmax_step(b->result, b->rows, b->vectors, b->result, b->maximum, b->sum, b->factor);
}

static void run_pack_panel(const void *what)
{
    const bench *b = what;
    b->k->pack_panel(b->matrix, mha_row_stride(b->depth, b->k->lanes, b->k->size), lanes(b), b->depth, 0.125,
                     b->panel, b->vectors);
}

static void run_unpack_panel(const void *what)
{
    const bench *b = what;
    b->k->unpack_panel(b->panel, b->vectors, b->factor, lanes(b), b->depth, b->matrix,
                       mha_row_stride(b->depth, b->k->lanes, b->k->size));
}

static void print_time(const bench *b, const char *kernel, const char *what, void (*run)(const void *), double flops,
                       double count)
{
    printf("%s\t%s\t%s\t%s\t%.2f\t%.0f\t%.0f\n", b->level, b->multiplied, kernel, what, 1e9 * best_seconds(run, b),
           flops, count);
    fflush(stdout);
}

static bench bench_of(const mha_kernels *k, size_t rows, size_t depth, size_t vectors)
{
    return (bench){.level = k->name, .multiplied = k->dtype == MHA_FLOAT32 ? "float32" : "float64", .k = k,
                   .rows = rows, .depth = depth, .vectors = vectors};
}

/* Times a product whose operands are there, and frees them. */
static void finish_product(bench *b, const char *use, void (*run)(const void *))
{
    const size_t P = lanes(b);
    b->result = numbers(b->k->dtype, b->rows * P);
    b->product.rows = b->rows;
    b->product.vectors = b->vectors;
    b->product.a = b->matrix;
    b->product.b = b->panel;
    b->product.b_k = P;
    b->product.c = b->result;
    b->product.c_row = P;
    char what[96];
    snprintf(what, sizeof what, "%s: %zu rows, depth %zu, %zu lanes", use, b->rows, b->depth, P);
    print_time(b, "product", what, run, 2.0 * (double)(b->rows * b->depth * P), (double)(b->rows * P));
    free(b->matrix);
    free(b->panel);
    free(b->result);
}

/* One product as the forward pass asks for it, in memory of its own. */
static void time_product(const mha_kernels *k, const char *use, size_t rows, size_t depth, size_t vectors,
                         bool rows_are_features)
{
    bench b = bench_of(k, rows, depth, vectors);
    const size_t stride = mha_row_stride(rows_are_features ? rows : depth, k->lanes, k->size);
    b.matrix = numbers(k->dtype, (rows_are_features ? depth : rows) * stride);
    b.panel = numbers(k->dtype, depth * lanes(&b));
    b.product = (mha_product){.depth = depth, .a_row = rows_are_features ? 1 : (ptrdiff_t)stride,
                              .a_k = rows_are_features ? (ptrdiff_t)stride : 1};
    finish_product(&b, use, run_product);
}

static const size_t head_widths[] = {32, 64, 80, 128, 256};

static void time_products(const mha_kernels *k)
{
    for (size_t vectors = k->vectors; vectors > 0; vectors--)
        time_product(k, "projection", 96, MHA_CHAIN, vectors, false);
    time_product(k, "projection", 1, MHA_CHAIN, k->vectors, false);
    time_product(k, "projection", 5, MHA_CHAIN, k->vectors, false);
    for (size_t i = 0; i < sizeof head_widths / sizeof *head_widths; i++)
        time_product(k, "scores", MHA_BLOCK_KEYS, head_widths[i], k->vectors, false);
    for (size_t i = 0; i < sizeof head_widths / sizeof *head_widths; i++)
        time_product(k, "values", head_widths[i], MHA_BLOCK_KEYS, k->vectors, true);
}

/* ---- Narrow products ---- */

/* `rows` rows of the operand a. */
static void narrow_rows(bench *b)
{
    const size_t words = b->narrow->row_words(b->depth);
    float *x = numbers(MHA_FLOAT32, b->depth);
    const uint32_t largest = b->narrow->largest ? b->narrow->largest(x, b->depth) : 0;
    uint32_t *matrix = allocate(b->rows * words * sizeof *matrix);
    for (size_t i = 0; i < b->rows; i++)
        b->narrow->take_row(x, b->depth, largest, matrix + i * words);
    free(x);
    b->matrix = matrix;
    b->product.a_row = (ptrdiff_t)words;
    b->product.a_k = 1;
}

/* [depth][width] with groups along the depth. */
static uint32_t *narrow_columns(const bench *b, size_t width)
{
    const size_t words = mha_divide_up(b->depth, b->narrow->group) * mha_divide_up(width, b->k->lanes) * b->k->lanes;
    float *x = numbers(MHA_FLOAT32, b->depth * width);
    uint32_t *columns = allocate(words * sizeof *columns);
    b->narrow->take_columns(x, width, b->depth, width, columns);
    free(x);
    return columns;
}

static bench narrow_bench(const char *level, mha_narrow_type type, size_t rows, size_t depth, size_t vectors)
{
    bench b = bench_of(mha_cpu_kernels_named(level, MHA_FLOAT32), rows, depth, vectors);
    b.level = level;
    b.multiplied = type == MHA_INT8 ? "int8" : "bfloat16";
    b.narrow = mha_cpu_narrow_named(level, type);
    b.product.depth = mha_divide_up(depth, b.narrow->group);
    return b;
}

static void time_narrow_projection(const char *level, mha_narrow_type type, size_t rows, size_t vectors)
{
    const size_t features = 768; /* as in BERT-base */
    const size_t chain = mha_cpu_narrow_named(level, type)->chain;
    bench b = narrow_bench(level, type, rows, mha_smaller(features, chain), vectors);
    float *scale = numbers(MHA_FLOAT32, lanes(&b));
    narrow_rows(&b);
    b.panel = numbers(MHA_BFLOAT16, b.product.depth * b.narrow->group * lanes(&b)); /* any bytes are int8 */
    b.product.b_type = MHA_BFLOAT16;
    b.product.b_scale = scale;
    finish_product(&b, "projection", run_narrow_product);
    free(scale);
}

static void time_narrow_scores(const char *level, size_t width, size_t vectors)
{
    bench b = narrow_bench(level, MHA_BF16, MHA_BLOCK_KEYS, width, vectors);
    narrow_rows(&b);
    b.panel = narrow_columns(&b, lanes(&b));
    finish_product(&b, "scores", run_narrow_product);
}

static void time_narrow_values(const char *level, size_t width, size_t vectors)
{
    bench b = narrow_bench(level, MHA_BF16, width, MHA_BLOCK_KEYS, vectors);
    b.matrix = narrow_columns(&b, width);
    b.product.a_row = 1;
    b.product.a_k = (ptrdiff_t)(mha_divide_up(width, b.k->lanes) * b.k->lanes);
    b.panel = narrow_columns(&b, lanes(&b));
    finish_product(&b, "values", run_narrow_product);
}

static void time_narrow_products(const char *level, mha_narrow_type type)
{
    const size_t most = mha_cpu_narrow_named(level, type)->vectors;
    for (size_t vectors = most; vectors > 0; vectors--)
        time_narrow_projection(level, type, 96, vectors);
    time_narrow_projection(level, type, 1, most);
    time_narrow_projection(level, type, 5, most);
    if (type == MHA_INT8)
        return;
    for (size_t i = 0; i < sizeof head_widths / sizeof *head_widths; i++)
        time_narrow_scores(level, head_widths[i], most);
    for (size_t i = 0; i < sizeof head_widths / sizeof *head_widths; i++)
        time_narrow_values(level, head_widths[i], most);
}

static void time_rest(const mha_kernels *k)
{
    bench b = bench_of(k, MHA_BLOCK_KEYS, 64, k->vectors);
    const size_t P = lanes(&b);
    b.matrix = numbers(k->dtype, P * mha_row_stride(b.depth, k->lanes, k->size));
    b.panel = numbers(k->dtype, b.depth * P);
    b.result = numbers(k->dtype, b.rows * P);
    b.maximum = numbers(k->dtype, P);
    b.sum = numbers(k->dtype, P);
    b.factor = numbers(k->dtype, P);
    k->softmax_begin(b.maximum, b.sum, b.vectors);
    char what[64];
    snprintf(what, sizeof what, "%zu keys, %zu lanes", b.rows, P);
    print_time(&b, "softmax_step", what, run_softmax_step, 0, (double)(b.rows * P));
    snprintf(what, sizeof what, "width %zu, %zu lanes", b.depth, P);
    print_time(&b, "pack_panel", what, run_pack_panel, 0, (double)(b.depth * P));
    k->fill(b.factor, P, 1);
    print_time(&b, "unpack_panel", what, run_unpack_panel, 0, (double)(b.depth * P));
    free(b.matrix);
    free(b.panel);
    free(b.result);
    free(b.maximum);
    free(b.sum);
    free(b.factor);
}

int main(void)
{
    const char *reason = NULL;
    if (!mha_cpu_init(&reason)) {
        fprintf(stderr, "%s\n", reason);
        return 1;
    }
    const char *name;
    for (size_t i = 0; (name = mha_cpu_supported(i)) != NULL; i++) {
        const char *below = mha_cpu_supported(i + 1); /* kernels that both have are timed there */
        for (int dtype = 0; dtype < 2; dtype++) {
            const mha_kernels *k = mha_cpu_kernels_named(name, (mha_dtype)dtype);
            if (below && k == mha_cpu_kernels_named(below, (mha_dtype)dtype))
                continue;
            time_products(k);
            time_rest(k);
        }
        for (int type = 0; type < 2; type++)
            if (!below || mha_cpu_narrow_named(name, (mha_narrow_type)type) !=
                              mha_cpu_narrow_named(below, (mha_narrow_type)type))
                time_narrow_products(name, (mha_narrow_type)type);
    }
    return 0;
}
