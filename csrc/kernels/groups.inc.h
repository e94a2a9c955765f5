/* SPDX-License-Identifier: Apache-2.0
 *
 * groups.inc.h - the tile of products by groups: some neighbours along the depth, 32 bits of a row, are multiplied and
 * added in one step. It is written once, and included after defining OF, the suffix of these names:
 *   sum, HEADER, GROUP_BYTES  the type of a sum of lanes_f32 lanes; the words before a row's groups; bytes of a group
 *   ADJACENT                  1 if the groups of a row are always adjacent: a_k is then no variable, which would be
 *                             one too many for clang's registers
 *   begin(row)                what the sums of a row start with
 *   load(b)                   a group of each of lanes_f32 features
 *   add(c, a, b)              c + the products of a group; a: a group of the row in all lanes
 *   end(sum, row, p, lane, addend, c)  the vector of results from this lane on to memory; addend may be NULL
 */
#define G_(name, of) name##_##of
#define G_OF(name, of) G_(name, of)
#define G(name) G_OF(name, OF)
#define TILES_(r, q, v, of) tiles_##r##x##q##x##v##_##of
#define TILES_OF(r, q, v, of) TILES_(r, q, v, of)
#define TILES(r, q, v) TILES_OF(r, q, v, OF)

/* The remaining rows of a product, and the remaining prefetches. */
typedef struct {
    const uint32_t *a;
    const float *addend; /* may be NULL */
    float *c;
    prefetching prefetch;
} G(progress);

/* Computes one tile. `rows`, `panels` and `vectors` are constants in every copy. Sums are variables of their own, as in
 * tile.inc.h. */
INLINE void G(tile)(const size_t rows, const size_t panels, const size_t vectors, const mha_product *p,
                    G(progress) *at)
{
    const ptrdiff_t a_row = p->a_row, a_rows_3 = 3 * a_row, a_k = G(ADJACENT) ? 1 : p->a_k;
    const uint32_t *row = at->a, *a_0 = row + G(HEADER), *a_4 = rows > 4 ? a_0 + 4 * a_row : a_0;
    const size_t vector_bytes = lanes_f32 * G(GROUP_BYTES);
    const size_t b_bytes = p->b_k * G(GROUP_BYTES), b_panel = p->b_panel_bytes, b_panels_3 = 3 * b_panel;
    const char *b = p->b;
    const vec_i32 no_group = splat_i32(0);
    if (rows > 4)
        FORGET(a_4);
#define START(r) const G(sum) start_##r = G(begin)(row + (r < rows ? r * a_row : 0));
    EACH_ROW(START)
#define DECLARE(r, q) G(sum) c##r##q##_0 = start_##r, c##r##q##_1 = start_##r, c##r##q##_2 = start_##r;
#define DECLARE_PANEL(q) EACH_ROW_AND(DECLARE, q)
    EACH_PANEL(DECLARE_PANEL)
#define ACCUMULATE(r, q) \
    if (r < rows) { \
        const vec_i32 a_r = splat_i32((int32_t)(r < 4 ? a_0 : a_4)[r % 4 == 3 ? a_rows_3 : r % 4 * a_row]); \
        c##r##q##_0 = G(add)(c##r##q##_0, a_r, b_0); \
        if (vectors > 1) \
            c##r##q##_1 = G(add)(c##r##q##_1, a_r, b_1); \
        if (vectors > 2) \
            c##r##q##_2 = G(add)(c##r##q##_2, a_r, b_2); \
    }
#define ACCUMULATE_PANEL(q) \
    if (q < panels) { \
        const char *b_q = b + (q == 3 ? b_panels_3 : q * b_panel); \
        const vec_i32 b_0 = G(load)(b_q); \
        const vec_i32 b_1 = vectors > 1 ? G(load)(b_q + vector_bytes) : no_group; \
        const vec_i32 b_2 = vectors > 2 ? G(load)(b_q + 2 * vector_bytes) : no_group; \
        EACH_ROW_AND(ACCUMULATE, q) \
    }
#define STEP \
    EACH_PANEL(ACCUMULATE_PANEL) \
    NEXT_STEP(rows);
    prefetch_pieces(&at->prefetch);
    TILE_LOOP(, rows, panels, b_panel, vectors * vector_bytes, p->depth, at->prefetch, STEP);
    const float *addend = at->addend;
    float *c = at->c;
#define FINISH_PANEL(q, r) \
    if (q < panels) { \
        G(end)(c##r##q##_0, row + r * a_row, p, q * vectors * lanes_f32, addend, c); \
        if (vectors > 1) \
            G(end)(c##r##q##_1, row + r * a_row, p, (q * vectors + 1) * lanes_f32, addend, c); \
        if (vectors > 2) \
            G(end)(c##r##q##_2, row + r * a_row, p, (q * vectors + 2) * lanes_f32, addend, c); \
    }
#define FINISH(r) \
    if (r < rows) { \
        EACH_PANEL_AND(FINISH_PANEL, r) \
        if (addend) \
            addend += p->addend_row; \
        c += p->c_row; \
    }
    EACH_ROW(FINISH)
#undef START
#undef DECLARE
#undef DECLARE_PANEL
#undef ACCUMULATE
#undef ACCUMULATE_PANEL
#undef STEP
#undef FINISH_PANEL
#undef FINISH
    at->a += (ptrdiff_t)rows * a_row;
    at->addend = addend;
    at->c = c;
}

#define COPY(r, q, v) \
    NOINLINE void TILES(r, q, v)(const mha_product *p, G(progress) *at, size_t tiles) \
    { \
        for (; tiles > 0; tiles--) \
            G(tile)(r, q, v, p, at); \
    }
EACH_TILE_1(COPY)
EACH_TILE_2(COPY)
#if REGISTERS > 16
EACH_TILE_3(COPY)
#endif
#undef COPY

static void G(product)(const mha_product *p)
{
#define NAME(r, q, v) [q - 1][r - 1] = TILES(r, q, v),
    static void (*const copies[][MAX_PANELS][MAX_ROWS])(const mha_product *, G(progress) *, size_t) = {
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
    G(progress) at = {.a = p->a, .addend = p->addend, .c = p->c,
                      .prefetch = begin_prefetching(p, share.tiles, p->vectors * lanes_f32 * G(GROUP_BYTES))};
    if (share.larger > 0)
        copies[p->vectors - 1][p->more_panels][share.rows](p, &at, share.larger);
    copies[p->vectors - 1][p->more_panels][share.rows - 1](p, &at, share.tiles - share.larger);
}

#undef G_
#undef G_OF
#undef G
#undef TILES_
#undef TILES_OF
#undef TILES
#undef OF
