/* SPDX-License-Identifier: Apache-2.0
 *
 * tiles.h - what tile.inc.h and groups.inc.h share. A simd_*.h comes before.
 */
#ifndef MHA_TILES_H
#define MHA_TILES_H

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))

enum { LINE_BYTES = 64, MAX_ROWS = 8 };

/* Makes the compiler forget how a pointer was computed. Otherwise gcc keeps the addresses of all rows of a tile at
 * once. There are more of them than registers, so it moves some to vector registers, where they wait behind the
 * multiplications. */
#define FORGET(pointer) __asm__("" : "+r"(pointer))

/* Rows of a full tile of V vectors: enough sums to keep the multiply-add units busy, and few enough for the
 * registers. */
#if REGISTERS == 16
enum { ROWS_1 = 8, ROWS_2 = 6, ROWS_3 = 4 };
#define EACH_TILE_1(X) X(1, 1) X(2, 1) X(3, 1) X(4, 1) X(5, 1) X(6, 1) X(7, 1) X(8, 1)
#define EACH_TILE_2(X) X(1, 2) X(2, 2) X(3, 2) X(4, 2) X(5, 2) X(6, 2)
#define EACH_TILE_3(X) X(1, 3) X(2, 3) X(3, 3) X(4, 3)
#else
enum { ROWS_1 = 8, ROWS_2 = 8, ROWS_3 = 8 };
#define EACH_TILE_1(X) X(1, 1) X(2, 1) X(3, 1) X(4, 1) X(5, 1) X(6, 1) X(7, 1) X(8, 1)
#define EACH_TILE_2(X) X(1, 2) X(2, 2) X(3, 2) X(4, 2) X(5, 2) X(6, 2) X(7, 2) X(8, 2)
#define EACH_TILE_3(X) X(1, 3) X(2, 3) X(3, 3) X(4, 3) X(5, 3) X(6, 3) X(7, 3) X(8, 3)
#endif

#define EACH_ROW(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)

/* What a product has still to prefetch: several rows, or a single one. */
typedef struct {
    const char *next;  /* several rows: the next one */
    size_t left, each; /* several rows: how many are left, and how many come before each tile */
    const char *ahead; /* a single row: the next byte */
    size_t step;       /* a single row: bytes to advance with each k */
} prefetching;

static inline prefetching begin_prefetching(const mha_product *p, size_t tiles)
{
    const mha_prefetch *wanted = p->prefetch;
    prefetching left = {.ahead = p->a};
    if (wanted && wanted->rows == 1 && p->depth > 0) {
        left.ahead = wanted->data;
        left.step = (wanted->bytes + tiles * p->depth - 1) / (tiles * p->depth);
    } else if (wanted) {
        left.next = wanted->data;
        left.left = wanted->rows;
        left.each = (wanted->rows + tiles - 1) / tiles;
    }
    return left;
}

/* Prefetches the rows that come before a tile. */
INLINE void prefetch_rows(const mha_prefetch *wanted, prefetching *left)
{
    for (size_t i = left->each; i > 0 && left->left > 0; i--) {
        for (size_t byte = 0; byte < wanted->bytes; byte += LINE_BYTES)
            __builtin_prefetch(left->next + byte, 0, 2);
        left->next += wanted->stride;
        left->left--;
    }
}

/* Prefetches as many bytes as a step reads of a panel: at most three lines. */
INLINE void prefetch_step(const char *ahead, size_t read)
{
    __builtin_prefetch(ahead, 0, 2);
    if (read > LINE_BYTES)
        __builtin_prefetch(ahead + LINE_BYTES, 0, 2);
    if (read > 2 * LINE_BYTES)
        __builtin_prefetch(ahead + 2 * LINE_BYTES, 0, 2);
}

/* n, rounded up to whole vectors. */
static inline size_t whole_vectors(size_t n)
{
    return (n + lanes_f32 - 1) / lanes_f32 * lanes_f32;
}

/* The first n numbers of a vector, at most all; the others are 0. */
static inline vec_f32 load_some(const float *x, size_t n)
{
    float some[lanes_f32] = {0};
    if (n >= lanes_f32)
        return load_f32(x);
    memcpy(some, x, n * sizeof *x);
    return load_f32(some);
}

/* Tiles share the rows of a product evenly: 9 rows are 5 + 4, because a tile of one row has too few sums. Of `tiles`
 * tiles, the first `larger` have a row more than the others. */
typedef struct {
    size_t tiles, rows, larger;
} shared_rows;

static inline shared_rows share_rows(size_t rows, size_t max_rows)
{
    if (rows <= max_rows)
        return (shared_rows){1, rows, 0};
    const size_t tiles = (rows - 1) / max_rows + 1;
    return (shared_rows){tiles, rows / tiles, rows % tiles};
}

#endif
