/* SPDX-License-Identifier: Apache-2.0
 *
 * int8.inc.h - products of int8, written once (the files of instruction sets include it after their simd_*.h).
 *
 * It needs, besides the vocabulary of float32:
 *   vec_i32                  lanes_f32 integers of 32 bits
 *   splat_i32(x), max_i32(a, b)
 *   bits_of(v), real_of(v)   the bits of float32 as integers; integers to float32
 *   rounded(v)               float32 to integers, to the nearest, ties to even; |v| < 2^20
 *   without_sign(v)          bits of a number -> bits of its magnitude
 *   row_int                  what a row holds of each number: int16_t or int8_t. A group fills 32 bits.
 *   store_row(p, v)          integers to row_int
 *   load_group(p)            a group of each of lanes_f32 features
 *   add_products(c, a, b)    c + the sum of a group's products, in each lane; a: a group in all lanes, b: of load_group().
 *                            The sum is held in a register. gcc would multiply a whole tile first, and spill.
 *   WEIGHT_OFFSET            what panels hold in addition to each weight
 */
#include "tiles.h"

enum { GROUP = 4 / sizeof(row_int), INT8_VECTORS = REGISTERS == 16 ? 2 : 3 };
enum { LEAST = 0x03800000 /* the bits of 2^-120: its reciprocal times 127 is finite */, INFINITE = 0x7f800000 };

_Static_assert(MHA_INT8_FEATURES % GROUP == 0, "groups do not cross the sums of integers");

/* ---- Rows ---- */

/* Rows have room for whole vectors. */
static size_t row_words(size_t n)
{
    return MHA_ROW_HEADER + (n + lanes_f32 - 1) / lanes_f32 * lanes_f32 / GROUP;
}

static uint32_t largest(const float *x, size_t n)
{
    vec_i32 most = splat_i32(0);
    size_t i = 0;
    for (; i + lanes_f32 <= n; i += lanes_f32)
        most = max_i32(most, without_sign(bits_of(load_f32(x + i))));
    if (i < n) {
        float last[lanes_f32] = {0};
        memcpy(last, x + i, (n - i) * sizeof *x);
        most = max_i32(most, without_sign(bits_of(load_f32(last))));
    }
    uint32_t lane[lanes_f32], result = 0;
    memcpy(lane, &most, sizeof lane);
    for (i = 0; i < lanes_f32; i++)
        result = lane[i] > result ? lane[i] : result;
    return result;
}

/* Panels hold WEIGHT_OFFSET in addition to each weight, which adds this to a sum for each unit of the row. */
static int32_t start_of(const row_int *q, size_t n)
{
    int32_t sum = 0;
    if (WEIGHT_OFFSET)
        for (size_t i = 0; i < n; i++)
            sum -= q[i];
    return sum * WEIGHT_OFFSET;
}

static void quantize(const float *x, size_t n, uint32_t largest_bits, uint32_t *row)
{
    row_int *q = (row_int *)(void *)(row + MHA_ROW_HEADER);
    float most, scale = largest_bits >= INFINITE ? NAN : 0;
    int32_t start = 0;
    memcpy(&most, &largest_bits, sizeof most);
    if (largest_bits < LEAST || largest_bits >= INFINITE) {
        memset(q, 0, (row_words(n) - MHA_ROW_HEADER) * sizeof *row);
    } else {
        const vec_f32 inverse = splat_f32(127 / most);
        size_t i = 0;
        for (; i + lanes_f32 <= n; i += lanes_f32)
            store_row(q + i, rounded(load_f32(x + i) * inverse));
        if (i < n) {
            float last[lanes_f32] = {0};
            memcpy(last, x + i, (n - i) * sizeof *x);
            store_row(q + i, rounded(load_f32(last) * inverse));
        }
        scale = most / 127;
        start = start_of(q, n);
    }
    memcpy(row, &scale, sizeof scale);
    memcpy(row + 1, &start, sizeof start);
}

/* ---- The tile ---- */

/* The rows of a product that are left, and what remains to be prefetched. */
typedef struct {
    const uint32_t *a;
    const float *addend; /* may be NULL */
    float *c;
    const char *ahead; /* the next byte */
    size_t step;       /* bytes to advance with each group */
} int8_progress;

/* addend + sum * scales */
INLINE void int8_finish(vec_i32 sum, vec_f32 row_scale, const mha_product *p, const float *addend, float *c, size_t lane)
{
    const vec_f32 scale = row_scale * load_f32(p->b_scale + lane);
    store_f32(c + lane, fma_f32(real_of(sum), scale, addend ? load_f32(addend + lane) : splat_f32(0)));
}

/* Computes one tile. `rows` and `vectors` are constants in every copy. Sums are variables of their own, as in
 * tile.inc.h. */
INLINE void int8_tile(const size_t rows, const size_t vectors, const mha_product *p, int8_progress *at)
{
    const ptrdiff_t a_row = p->a_row, a_rows_3 = 3 * a_row;
    const uint32_t *row = at->a, *a_0 = row + MHA_ROW_HEADER, *a_4 = rows > 4 ? a_0 + 4 * a_row : a_0;
    const size_t vector_bytes = lanes_f32 * GROUP, b_bytes = p->b_k * GROUP, step = at->step;
    const int8_t *b = p->b;
    const char *ahead = at->ahead;
    const vec_i32 zero = splat_i32(0);
    if (rows > 4)
        FORGET(a_4);
#define DECLARE(r) \
    const vec_i32 start_##r = r < rows ? splat_i32((int32_t)row[r * a_row + 1]) : zero; \
    vec_i32 c##r##_0 = start_##r, c##r##_1 = start_##r, c##r##_2 = start_##r;
    EACH_ROW(DECLARE)
    for (size_t k = p->depth; k > 0; k--) {
        const vec_i32 b_0 = load_group(b);
        const vec_i32 b_1 = vectors > 1 ? load_group(b + vector_bytes) : zero;
        const vec_i32 b_2 = vectors > 2 ? load_group(b + 2 * vector_bytes) : zero;
#define ACCUMULATE(r) \
    if (r < rows) { \
        const vec_i32 a_r = splat_i32((int32_t)(r < 4 ? a_0 : a_4)[r % 4 == 3 ? a_rows_3 : r % 4 * a_row]); \
        c##r##_0 = add_products(c##r##_0, a_r, b_0); \
        if (vectors > 1) \
            c##r##_1 = add_products(c##r##_1, a_r, b_1); \
        if (vectors > 2) \
            c##r##_2 = add_products(c##r##_2, a_r, b_2); \
    }
        EACH_ROW(ACCUMULATE)
        __builtin_prefetch(ahead, 0, 2);
        ahead += step;
        a_0++;
        a_4++;
        b += b_bytes;
    }
    at->ahead = ahead;
    const float *addend = at->addend;
    float *c = at->c;
#define FINISH(r) \
    if (r < rows) { \
        float scale_##r; \
        memcpy(&scale_##r, row + r * a_row, sizeof scale_##r); \
        int8_finish(c##r##_0, splat_f32(scale_##r), p, addend, c, 0); \
        if (vectors > 1) \
            int8_finish(c##r##_1, splat_f32(scale_##r), p, addend, c, lanes_f32); \
        if (vectors > 2) \
            int8_finish(c##r##_2, splat_f32(scale_##r), p, addend, c, 2 * lanes_f32); \
        if (addend) \
            addend += p->addend_row; \
        c += p->c_row; \
    }
    EACH_ROW(FINISH)
#undef DECLARE
#undef ACCUMULATE
#undef FINISH
    at->a += (ptrdiff_t)rows * a_row;
    at->addend = addend;
    at->c = c;
}

#define COPY(r, v) \
    NOINLINE void tiles_##r##x##v##_int8(const mha_product *p, int8_progress *at, size_t tiles) \
    { \
        for (; tiles > 0; tiles--) \
            int8_tile(r, v, p, at); \
    }
EACH_TILE_1(COPY)
EACH_TILE_2(COPY)
#if REGISTERS > 16
EACH_TILE_3(COPY)
#endif
#undef COPY

static void int8_product(const mha_product *p)
{
#define NAME(r, v) tiles_##r##x##v##_int8,
    static void (*const copies[][MAX_ROWS])(const mha_product *, int8_progress *, size_t) = {
        {EACH_TILE_1(NAME)},
        {EACH_TILE_2(NAME)},
#if REGISTERS > 16
        {EACH_TILE_3(NAME)},
#endif
    };
#undef NAME
    static const size_t max_rows[] = {ROWS_1, ROWS_2, ROWS_3};
    if (p->rows == 0)
        return;
    const shared_rows share = share_rows(p->rows, max_rows[p->vectors - 1]);
    int8_progress at = {.a = p->a, .addend = p->addend, .c = p->c, .ahead = p->a};
    if (p->prefetch && p->prefetch->rows == 1 && p->depth > 0) {
        at.ahead = p->prefetch->data;
        at.step = (p->prefetch->bytes + share.tiles * p->depth - 1) / (share.tiles * p->depth);
    }
    if (share.larger > 0)
        copies[p->vectors - 1][share.rows](p, &at, share.larger);
    copies[p->vectors - 1][share.rows - 1](p, &at, share.tiles - share.larger);
}

#define MHA_INT8_KERNELS \
    { \
        .group = GROUP, .vectors = INT8_VECTORS, .weight_offset = WEIGHT_OFFSET, .row_words = row_words, \
        .largest = largest, .quantize = quantize, .product = int8_product, \
    }
