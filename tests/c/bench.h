/* SPDX-License-Identifier: Apache-2.0
 *
 * bench.h - a kernel table, and one way to run a case on it: which width of panel, which end of a buffer is guarded.
 */
#ifndef MHA_TESTS_BENCH_H
#define MHA_TESTS_BENCH_H

#include "check.h"
#include "cpu.h"
#include "guarded.h"
#include "numbers.h"

enum { MAX_LANES = 64 }; /* of a panel, in any table */

/* The most panels that a product may have. */
static inline size_t most_panels(size_t vectors, size_t rows)
{
    return vectors > 1 ? mha_panels_at_once(rows) : 1;
}

typedef struct {
    const mha_kernels *k;
    mha_dtype dtype;
    size_t vectors, P;
    guarded_side side;
    bool has_fma; /* a true one: all such levels must agree bit for bit */
} bench;

static inline bench make_bench(const char *level, mha_dtype dtype, size_t vectors, guarded_side side)
{
    const mha_kernels *k = mha_cpu_kernels_named(level, dtype);
    return (bench){k, dtype, vectors, vectors * k->lanes, side, strcmp(level, "portable") != 0};
}

/* Whether a level has tables of its own, and not those of the level below it with other narrow products. */
static inline bool has_own_tables(const char *level)
{
    return strcmp(mha_cpu_kernels_named(level, MHA_FLOAT32)->name, level) == 0;
}

/* Runs test() on every table of this CPU, with panels of every width, and both ends of buffers guarded. */
static inline void on_every_bench(void (*test)(const bench *))
{
    for (size_t i = 0; mha_cpu_supported(i); i++)
        for (int dtype = 0; dtype < 2 && has_own_tables(mha_cpu_supported(i)); dtype++)
            for (size_t v = 1; v <= mha_cpu_kernels_named(mha_cpu_supported(i), (mha_dtype)dtype)->vectors; v++)
                for (int side = 0; side < 2; side++) {
                    const bench b = make_bench(mha_cpu_supported(i), (mha_dtype)dtype, v, (guarded_side)side);
                    test(&b);
                }
}

static inline void *buffer(const bench *b, size_t slot, size_t numbers)
{
    return guarded_buffer(slot, numbers * b->k->size, b->side);
}

static inline void *random_buffer(const bench *b, size_t slot, size_t numbers, uint64_t seed)
{
    void *x = buffer(b, slot, numbers);
    for (size_t i = 0; i < numbers; i++)
        put(b->dtype, x, (ptrdiff_t)i, random_number(b->dtype, seed, i));
    return x;
}

static inline void describe(const bench *b, const char *what)
{
    DESCRIBE("%s %s %s, %zu vectors, guarded at the %s", b->k->name, dtype_name(b->dtype), what, b->vectors,
             b->side == AT_END ? "end" : "start");
}

/* The same bits, or both NaN; the two numbers that follow say where. */
#define CHECK_SAME(got, wanted, i, j) \
    do { \
        const double got_ = (got), wanted_ = (wanted); \
        CHECK(identical(got_, wanted_), "%a instead of %a, at %zu, %zu", got_, wanted_, (size_t)(i), (size_t)(j)); \
    } while (0)

#endif
