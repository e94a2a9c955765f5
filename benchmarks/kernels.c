/* SPDX-License-Identifier: Apache-2.0
 *
 * kernels.c - times the kernels of every instruction set of this CPU, one by one.
 *
 * Prints a line for each: level, dtype, kernel, what it was given, nanoseconds a call, floating-point operations a
 * call (0 where a kernel moves or transforms numbers), numbers a call. Compiled and read by kernels.py.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "calls.h"
#include "cpu.h"
#include "stopwatch.h"
#include "workspace.h"

/* What a kernel is given: one struct for all, so that one loop times them all. */
typedef struct {
    const mha_kernels *k;
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
    printf("%s\t%s\t%s\t%s\t%.2f\t%.0f\t%.0f\n", b->k->name, b->k->dtype == MHA_FLOAT32 ? "float32" : "float64",
           kernel, what, 1e9 * best_seconds(run, b), flops, count);
    fflush(stdout);
}

/* One product as the forward pass asks for it, in memory of its own. */
static void time_product(const mha_kernels *k, const char *use, size_t rows, size_t depth, size_t vectors,
                         bool rows_are_features)
{
    bench b = {.k = k, .rows = rows, .depth = depth, .vectors = vectors};
    const size_t stride = mha_row_stride(rows_are_features ? rows : depth, k->lanes, k->size);
    const size_t P = lanes(&b);
    b.matrix = numbers(k->dtype, (rows_are_features ? depth : rows) * stride);
    b.panel = numbers(k->dtype, depth * P);
    b.result = numbers(k->dtype, rows * P);
    b.product = (mha_product){.rows = rows, .depth = depth, .vectors = vectors, .a = b.matrix,
                              .a_row = rows_are_features ? 1 : (ptrdiff_t)stride,
                              .a_k = rows_are_features ? (ptrdiff_t)stride : 1,
                              .b = b.panel, .b_k = P, .c = b.result, .c_row = P};
    char what[96];
    snprintf(what, sizeof what, "%s: %zu rows, depth %zu, %zu lanes", use, rows, depth, P);
    print_time(&b, "product", what, run_product, 2.0 * (double)(rows * depth * P), (double)(rows * P));
    free(b.matrix);
    free(b.panel);
    free(b.result);
}

static void time_products(const mha_kernels *k)
{
    static const size_t head_widths[] = {32, 64, 80, 128, 256};
    for (size_t vectors = k->vectors; vectors > 0; vectors--)
        time_product(k, "projection", 96, MHA_CHAIN, vectors, false);
    time_product(k, "projection", 1, MHA_CHAIN, k->vectors, false);
    time_product(k, "projection", 5, MHA_CHAIN, k->vectors, false);
    for (size_t i = 0; i < sizeof head_widths / sizeof *head_widths; i++)
        time_product(k, "scores", MHA_BLOCK_KEYS, head_widths[i], k->vectors, false);
    for (size_t i = 0; i < sizeof head_widths / sizeof *head_widths; i++)
        time_product(k, "values", head_widths[i], MHA_BLOCK_KEYS, k->vectors, true);
}

static void time_rest(const mha_kernels *k)
{
    bench b = {.k = k, .rows = MHA_BLOCK_KEYS, .depth = 64, .vectors = k->vectors};
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
    for (size_t i = 0; (name = mha_cpu_supported(i)) != NULL; i++)
        for (int dtype = 0; dtype < 2; dtype++) {
            const mha_kernels *k = mha_cpu_kernels_named(name, (mha_dtype)dtype);
            if (strcmp(k->name, name) != 0) /* the level differs from the one below in narrow products alone */
                continue;
            time_products(k);
            time_rest(k);
        }
    return 0;
}
