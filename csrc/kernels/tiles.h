/* SPDX-License-Identifier: Apache-2.0
 *
 * tiles.h - what tile.inc.h and groups.inc.h share. A simd_*.h comes before.
 */
#ifndef MHA_TILES_H
#define MHA_TILES_H

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))

enum { LINE_BYTES = 64, MAX_ROWS = 8, MAX_PANELS = 4 };

/* Makes the compiler forget how a pointer was computed. Otherwise gcc keeps the addresses of all rows of a tile at
 * once. There are more of them than registers, so it moves some to vector registers, where they wait behind the
 * multiplications. */
#define FORGET(pointer) __asm__("" : "+r"(pointer))

/* Moves the pointers of a tile, a_0, a_4 and b, to its next step. A tile has several loops. clang would keep addresses
 * for all of them; gcc makes slower loops if it has to forget them. */
#ifdef __clang__
#define FORGET_IN_LOOP(pointer) FORGET(pointer)
#else
#define FORGET_IN_LOOP(pointer) ((void)0)
#endif
#define NEXT_STEP(rows) \
    do { \
        a_0 += a_k; \
        FORGET_IN_LOOP(a_0); \
        if (rows > 4) { \
            a_4 += a_k; \
            FORGET_IN_LOOP(a_4); \
        } \
        b += b_bytes; \
        FORGET_IN_LOOP(b); \
    } while (0)

/* The copies of a tile: X(rows, panels, vectors of a panel). */
#define SEVERAL_PANELS(X, v) X(1, 2, v) X(1, 3, v) X(1, 4, v) X(2, 2, v)
#define UP_TO_4_ROWS(X, v) X(1, 1, v) X(2, 1, v) X(3, 1, v) X(4, 1, v)
#define EACH_TILE_1(X) UP_TO_4_ROWS(X, 1) X(5, 1, 1) X(6, 1, 1) X(7, 1, 1) X(8, 1, 1)

/* Rows of a full tile of V vectors: enough sums to keep the multiply-add units busy, and few enough for the
 * registers. */
#if REGISTERS == 16
enum { ROWS_1 = 8, ROWS_2 = 6, ROWS_3 = 4 };
#define EACH_TILE_2(X) SEVERAL_PANELS(X, 2) UP_TO_4_ROWS(X, 2) X(5, 1, 2) X(6, 1, 2)
#define EACH_TILE_3(X) SEVERAL_PANELS(X, 3) UP_TO_4_ROWS(X, 3)
#else
enum { ROWS_1 = 8, ROWS_2 = 8, ROWS_3 = 8 };
#define EACH_TILE_2(X) SEVERAL_PANELS(X, 2) UP_TO_4_ROWS(X, 2) X(5, 1, 2) X(6, 1, 2) X(7, 1, 2) X(8, 1, 2)
#define EACH_TILE_3(X) SEVERAL_PANELS(X, 3) UP_TO_4_ROWS(X, 3) X(5, 1, 3) X(6, 1, 3) X(7, 1, 3) X(8, 1, 3)
#endif

#define EACH_ROW(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define EACH_ROW_AND(X, y) X(0, y) X(1, y) X(2, y) X(3, y) X(4, y) X(5, y) X(6, y) X(7, y)
#define EACH_PANEL(X) X(0) X(1) X(2) X(3)
#define EACH_PANEL_AND(X, ...) X(0, __VA_ARGS__) X(1, __VA_ARGS__) X(2, __VA_ARGS__) X(3, __VA_ARGS__)

/* The remaining prefetches of a product: pieces before each tile, or a part of one row in each step. */
typedef struct {
    const char *next;  /* the next piece */
    ptrdiff_t stride;  /* the distance between pieces, in bytes */
    size_t bytes;      /* of a piece */
    size_t left, each; /* how many pieces are left, and how many come before each tile */
    const char *ahead; /* the next byte of the row */
    size_t step;       /* bytes to advance with each k; 0: steps prefetch nothing */
} prefetching;

/* The most bytes of a single row that come before a tile. More requests at once would delay what the tile reads. */
enum { MAX_PIECE = 512 };

/* How far ahead a product prefetches its own panel. */
enum { OWN_AHEAD = 2048 };

/* Whether the hardware fetches the panels of a product of few rows in time, so that its tiles prefetch nothing. Two of
 * these three are enough. */
INLINE bool hardware_keeps_up(size_t rows, size_t panels, size_t read)
{
    return (rows == 1) + (panels > 1) + (read > LINE_BYTES) >= 2;
}

/* Each step of the product's tiles reads `read` bytes of a panel.
 *
 * A tile of one to three rows waits for the panel. If a step reads whole lines, the hardware fetches them in time, so
 * that the next panel can be prefetched. Otherwise the product prefetches its own panels, and what follows them. */
static inline prefetching begin_prefetching(const mha_product *p, size_t tiles, size_t read)
{
    const mha_prefetch *wanted = p->prefetch;
    if (!wanted)
        return (prefetching){0};
    if (p->more_panels > 0 || (wanted->rows == 1 && p->rows <= 3 && read % LINE_BYTES != 0)) {
        const bool keeps_up = hardware_keeps_up(p->rows, 1 + p->more_panels, read);
        return (prefetching){.ahead = (const char *)p->b + OWN_AHEAD, .step = keeps_up ? 0 : read};
    }
    if (wanted->rows != 1)
        return (prefetching){.next = wanted->data, .stride = wanted->stride_bytes, .bytes = wanted->bytes,
                             .left = wanted->rows, .each = mha_divide_up(wanted->rows, tiles)};
    if (wanted->bytes > MAX_PIECE * tiles && p->depth > 0)
        return (prefetching){.ahead = wanted->data, .step = mha_divide_up(wanted->bytes, tiles * p->depth)};
    const size_t piece = mha_divide_up(wanted->bytes, tiles);
    return (prefetching){.next = wanted->data, .stride = (ptrdiff_t)piece, .bytes = piece, .left = tiles, .each = 1};
}

/* Prefetches the pieces that come before a tile. */
INLINE void prefetch_pieces(prefetching *left)
{
    for (size_t i = left->each; i > 0 && left->left > 0; i--) {
        for (size_t byte = 0; byte < left->bytes; byte += LINE_BYTES)
            __builtin_prefetch(left->next + byte, 0, 2);
        left->next += left->stride;
        left->left--;
    }
}

/* The lines that a step prefetches at most. Tiles of one to three rows leave the others to the hardware if a step reads
 * whole lines. */
INLINE size_t lines_of_step(size_t rows, size_t read)
{
    return rows <= 3 && read % LINE_BYTES == 0 ? 1 : mha_divide_up(read, LINE_BYTES);
}

/* The loop of a tile of some rows. A STEP reads `read` bytes of the panel, and UNROLL is MHA_UNROLL_4 or nothing.
 *
 * Where two threads share a core, each gets half of the instructions that it can begin, and these limit the loop. So it
 * is unrolled, and there are copies that prefetch less. If there are two panels, `panel` bytes apart, a step prefetches
 * a line of each, or nothing. Where the hardware keeps up with several panels, copies that prefetch never run. They are
 * not compiled. */
#define TILE_LOOP(UNROLL, rows, panels, panel, read, depth, prefetch, STEP) \
    do { \
        const size_t step_ = panels > 1 && hardware_keeps_up(rows, panels, read) ? 0 : (prefetch).step; \
        const char *ahead_ = (prefetch).ahead; \
        if (step_ == 0) { \
            UNROLL \
            for (size_t k_ = depth; k_ > 0; k_--) { \
                STEP \
            } \
        } else if (step_ <= LINE_BYTES || lines_of_step(rows, read) == 1) { \
            UNROLL \
            for (size_t k_ = depth; k_ > 0; k_--, ahead_ += step_) { \
                STEP \
                __builtin_prefetch(ahead_, 0, 2); \
                if (panels > 1) \
                    __builtin_prefetch(ahead_ + panel, 0, 2); \
            } \
        } else { \
            for (size_t k_ = depth; k_ > 0; k_--, ahead_ += step_) { \
                STEP \
                __builtin_prefetch(ahead_, 0, 2); \
                __builtin_prefetch(ahead_ + LINE_BYTES, 0, 2); \
                if (lines_of_step(rows, read) > 2) \
                    __builtin_prefetch(ahead_ + 2 * LINE_BYTES, 0, 2); \
            } \
        } \
        (prefetch).ahead = ahead_; \
    } while (0)

/* n, rounded up to whole vectors. */
static inline size_t whole_vectors(size_t n)
{
    return (n + lanes_f32 - 1) / lanes_f32 * lanes_f32;
}

/* The first n numbers of a vector, at most all; the others are 0. */
static inline vec_f32 load_some(const float *x, size_t n)
{
    if (n >= lanes_f32)
        return load_f32(x);
    float some[lanes_f32] = {0}; /* not before, since it is stored */
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
