/* SPDX-License-Identifier: Apache-2.0
 *
 * tile.inc.h - the tile: all multiplication happens here (kernels.inc.h includes it).
 */

#ifndef MHA_TILE_INC_H
#define MHA_TILE_INC_H

enum { STORE, ADD, RESCALE }; /* the three ends of a product, see mha_product */

#ifndef ROWS_OF_MANY
#define ROWS_OF_MANY {ROWS_1, ROWS_2, ROWS_3}
#endif

enum { MAX_FEW_ROWS = 8 };

/* The copies of a tile by what b holds: numbers of the table, or halves, which float32 tables read. */
enum { OWN, OF_BF16, OF_F16 };
#define HAS_HALVES_f32 1
#define HAS_HALVES_f64 0
#define HAS_HALVES PASTE(HAS_HALVES, DTYPE)

static inline size_t b_size(const size_t b_type, size_t own)
{
    return b_type == OWN ? own : sizeof(uint16_t);
}

#ifndef WIDEN_BF16_TIGHT
#define WIDEN_BF16_TIGHT widen_bf16
#endif

/* Whether the sums of a tile and what it multiplies fill all registers. One or two rows are multiplied by one vector
 * at a time, while the next one is loaded. */
static inline bool is_tight(const size_t rows, const size_t panels, const size_t vectors)
{
    const size_t factors = rows <= 2 ? rows + 2 : 1 + vectors;
    return rows * panels * vectors + factors >= REGISTERS;
}

static inline vec_f32 load_b_f32(const size_t b_type, const bool tight, const char *b)
{
    const void *p = b;
    return b_type == OWN ? load_f32(p) : b_type == OF_F16 ? widen_f16(p) : tight ? WIDEN_BF16_TIGHT(p) : widen_bf16(p);
}

static inline vec_f64 load_b_f64(const size_t b_type, const bool tight, const char *b)
{
    const void *p = b;
    (void)b_type;
    (void)tight;
    return load_f64(p);
}

#endif

/* Ends a chain. `end` is a constant in every copy. */
INLINE void V(finish)(const int end, VEC chain, const REAL *addend, const REAL *factor, REAL *c, size_t lane)
{
    if (end == RESCALE)
        chain = V(fma)(V(load)(addend + lane), V(load)(factor + lane), chain);
    else if (end == ADD)
        chain = V(load)(addend + lane) + chain;
    V(store)(c + lane, chain);
}

/* The remaining rows of a product, and the remaining prefetches. */
typedef struct {
    const REAL *a, *addend; /* addend may be NULL */
    REAL *c;
    prefetching prefetch;
} V(progress);

/* Computes one tile. `rows`, `panels`, `vectors` and `b_type` are constants in every copy.
 *
 * Each sum is a variable of its own, because gcc would keep an array of them in memory. Broadcasts are not loaded
 * before they are used: that would need more registers than there are. Rows of a are addressed from every fourth row,
 * by one, two or three strides, and panels from the first one. One or two rows are multiplied by one vector after the
 * other, so that the sums of several panels find room. */
INLINE void V(tile)(const size_t rows, const size_t panels, const size_t vectors, const size_t b_type,
                    const mha_product *p, V(progress) *at)
{
    const ptrdiff_t a_row = p->a_row, a_rows_3 = 3 * a_row, a_k = p->a_k;
    const size_t b_panel = p->b_panel_bytes, b_panels_3 = 3 * b_panel;
    const size_t vector_bytes = LANES * b_size(b_type, sizeof(REAL));
    const size_t b_bytes = p->b_k * b_size(b_type, sizeof(REAL));
    const REAL *a_0 = at->a, *a_4 = rows > 4 ? a_0 + 4 * a_row : a_0;
    const bool tight = is_tight(rows, panels, vectors);
    const char *b = p->b;
    const VEC zero = V(splat)(0);
    if (rows > 4)
        FORGET(a_4);
#define DECLARE(r, q) VEC c##r##q##_0 = zero, c##r##q##_1 = zero, c##r##q##_2 = zero;
#define DECLARE_PANEL(q) EACH_ROW_AND(DECLARE, q)
    EACH_PANEL(DECLARE_PANEL)
#define ACCUMULATE(r) \
    if (r < rows) { \
        const VEC a_r = V(broadcast)((r < 4 ? a_0 : a_4) + (r % 4 == 3 ? a_rows_3 : r % 4 * a_row)); \
        c##r##0_0 = V(fma)(a_r, b_0, c##r##0_0); \
        if (vectors > 1) \
            c##r##0_1 = V(fma)(a_r, b_1, c##r##0_1); \
        if (vectors > 2) \
            c##r##0_2 = V(fma)(a_r, b_2, c##r##0_2); \
    }
#define ACCUMULATE_VECTOR(q, v) \
    if (q < panels && v < vectors) { \
        VEC b_v = V(load_b)(b_type, tight, b + (q == 3 ? b_panels_3 : q * b_panel) + v * vector_bytes); \
        if (rows == 2) \
            HOLD(b_v); \
        c0##q##_##v = V(fma)(first, b_v, c0##q##_##v); \
        if (rows == 2) \
            c1##q##_##v = V(fma)(second, b_v, c1##q##_##v); \
    }
#define ACCUMULATE_PANEL(q) ACCUMULATE_VECTOR(q, 0) ACCUMULATE_VECTOR(q, 1) ACCUMULATE_VECTOR(q, 2)
#define STEP \
    if (rows <= 2) { \
        const VEC first = V(broadcast)(a_0), second = rows == 2 ? V(broadcast)(a_0 + a_row) : zero; \
        EACH_PANEL(ACCUMULATE_PANEL) \
    } else { \
        VEC b_0 = V(load_b)(b_type, tight, b); \
        VEC b_1 = vectors > 1 ? V(load_b)(b_type, tight, b + vector_bytes) : zero; \
        VEC b_2 = vectors > 2 ? V(load_b)(b_type, tight, b + 2 * vector_bytes) : zero; \
        if (rows == 3) { \
            HOLD(b_0); \
            if (vectors > 1) \
                HOLD(b_1); \
            if (vectors > 2) \
                HOLD(b_2); \
        } \
        EACH_ROW(ACCUMULATE) \
    } \
    NEXT_STEP(rows);
    prefetch_pieces(&at->prefetch);
    TILE_LOOP(MHA_UNROLL_4, rows, panels, b_panel, vectors * vector_bytes, p->depth, at->prefetch, STEP);
    const REAL *addend = at->addend, *factor = p->factor;
    REAL *c = at->c;
    const size_t addend_row = p->addend_row, c_row = p->c_row;
#define FINISH_PANEL(q, r, end) \
    if (q < panels) { \
        V(finish)(end, c##r##q##_0, addend, factor, c, q * vectors * LANES); \
        if (vectors > 1) \
            V(finish)(end, c##r##q##_1, addend, factor, c, (q * vectors + 1) * LANES); \
        if (vectors > 2) \
            V(finish)(end, c##r##q##_2, addend, factor, c, (q * vectors + 2) * LANES); \
    }
#define FINISH(r, end) \
    if (r < rows) { \
        EACH_PANEL_AND(FINISH_PANEL, r, end) \
        if (end != STORE) { \
            addend += addend_row; \
            FORGET(addend); \
        } \
        c += c_row; \
        FORGET(c); \
    }
    if (!addend) {
        EACH_ROW_AND(FINISH, STORE)
    } else if (!factor) {
        EACH_ROW_AND(FINISH, ADD)
    } else {
        EACH_ROW_AND(FINISH, RESCALE)
    }
#undef DECLARE
#undef DECLARE_PANEL
#undef ACCUMULATE
#undef ACCUMULATE_VECTOR
#undef ACCUMULATE_PANEL
#undef STEP
#undef FINISH_PANEL
#undef FINISH
    at->a += (ptrdiff_t)rows * p->a_row;
    at->addend = addend;
    at->c = c;
}

/* The copies are not inlined, so that the registers of one do not disturb those of another. */
#define COPY(name, r, q, v, b_type) \
    NOINLINE void name(const mha_product *p, V(progress) *at, size_t tiles) \
    { \
        for (; tiles > 0; tiles--) \
            V(tile)(r, q, v, b_type, p, at); \
    }
#define COPY_OWN(r, q, v) COPY(V(tiles_##r##x##q##x##v), r, q, v, OWN)
EACH_TILE_1(COPY_OWN)
EACH_TILE_2(COPY_OWN)
EACH_TILE_3(COPY_OWN)
#if HAS_HALVES
#define COPY_BF16(r, q, v) COPY(tiles_##r##x##q##x##v##_bf16, r, q, v, OF_BF16)
#define COPY_F16(r, q, v) COPY(tiles_##r##x##q##x##v##_f16, r, q, v, OF_F16)
EACH_TILE_1(COPY_BF16)
EACH_TILE_2(COPY_BF16)
EACH_TILE_3(COPY_BF16)
EACH_TILE_1(COPY_F16)
EACH_TILE_2(COPY_F16)
EACH_TILE_3(COPY_F16)
#endif
#undef COPY
#undef COPY_OWN
#undef COPY_BF16
#undef COPY_F16

static void V(product)(const mha_product *p)
{
#define NAME(r, q, v) [q - 1][r - 1] = V(tiles_##r##x##q##x##v),
#define NAME_BF16(r, q, v) [q - 1][r - 1] = tiles_##r##x##q##x##v##_bf16,
#define NAME_F16(r, q, v) [q - 1][r - 1] = tiles_##r##x##q##x##v##_f16,
    static void (*const copies[][VECTORS][MAX_PANELS][MAX_ROWS])(const mha_product *, V(progress) *, size_t) = {
        [OWN] = {{EACH_TILE_1(NAME)}, {EACH_TILE_2(NAME)}, {EACH_TILE_3(NAME)}},
#if HAS_HALVES
        [OF_BF16] = {{EACH_TILE_1(NAME_BF16)}, {EACH_TILE_2(NAME_BF16)}, {EACH_TILE_3(NAME_BF16)}},
        [OF_F16] = {{EACH_TILE_1(NAME_F16)}, {EACH_TILE_2(NAME_F16)}, {EACH_TILE_3(NAME_F16)}},
#endif
    };
#undef NAME
#undef NAME_BF16
#undef NAME_F16
    const size_t b_type = p->b_type == MHA_BFLOAT16 ? OF_BF16 : p->b_type == MHA_FLOAT16 ? OF_F16 : OWN;
    static const size_t rows_of_few[VECTORS] = {ROWS_1, ROWS_2, ROWS_3}, rows_of_many[VECTORS] = ROWS_OF_MANY;
    if (p->rows == 0)
        return;
    /* A product of few rows waits for its panel, and one of halves widens it. Both read it as rarely as possible. */
    const bool are_many = p->rows > MAX_FEW_ROWS && b_type == OWN;
    const size_t max_rows = (are_many ? rows_of_many : rows_of_few)[p->vectors - 1];
    const shared_rows share = share_rows(p->rows, max_rows);
    V(progress) at = {.a = p->a, .addend = p->addend, .c = p->c,
                      .prefetch = begin_prefetching(p, share.tiles, p->vectors * LANES * b_size(b_type, sizeof(REAL)))};
    if (share.larger > 0)
        copies[b_type][p->vectors - 1][p->more_panels][share.rows](p, &at, share.larger);
    copies[b_type][p->vectors - 1][p->more_panels][share.rows - 1](p, &at, share.tiles - share.larger);
}
