/* SPDX-License-Identifier: Apache-2.0
 *
 * test_kernels.c - the kernels of every table this CPU can run, softmax apart, against kernels.h.
 *
 *     cc -std=c11 -D_GNU_SOURCE -O2 -ffp-contract=off -Icsrc tests/c/test_kernels.c csrc/?*.c csrc/kernels/?*.c \
 *        -o test_kernels -lpthread -lm && ./test_kernels
 *
 * kernels.h defines them by single operations, which are done here one by one in plain C: the results must agree bit
 * for bit. Only the product of the portable table, which has no true FMA, is given a bound. Every case runs twice, with
 * all buffers ending at an inaccessible page and with all starting at one.
 */
#include "bench.h"
#include "philox.h"

enum { MAX_ROWS = 97, MAX_WIDTH = 4 * MAX_LANES };

/* ---- product ---- */

typedef enum { NO_ADDEND, ITS_OWN_ROWS, ONE_ROW, IN_PLACE, ADDENDS } addend_kind;

/* Tiles have three loops: their steps prefetch nothing (some rows, or a short one, come before them), one line, or all
 * lines. */
typedef enum { SOME_ROWS, A_SHORT_ROW, A_ROW, A_LONG_ROW, PREFETCHED } prefetched_kind;

typedef struct {
    size_t rows, depth, layout, gap; /* gap: unused numbers after each row of b, addend and c */
    addend_kind addend;
    bool has_factor;
    prefetched_kind prefetched;
    size_t panels;
    mha_dtype b_type; /* a half, or 0: that of the table */
} product_case;

typedef struct {
    ptrdiff_t row, k;
} strides;

enum { LAYOUTS = 9 };

static strides layout_of(const product_case *c)
{
    const ptrdiff_t rows = (ptrdiff_t)c->rows, depth = (ptrdiff_t)c->depth;
    const strides layouts[LAYOUTS] = {
        {depth, 1}, {depth + 5, 1}, {1, rows},   {1, rows + 7}, {-depth, 1},
        {depth, -1}, {0, 1},        {1, 0},      {1031, 3},
    };
    return layouts[c->layout];
}

/* Mostly in [-1, 1), but also zeros of both signs, subnormal numbers and large ones. */
static double operand(mha_dtype dtype, uint64_t seed, uint64_t i)
{
    const double x = random_number(dtype, seed, i);
    switch (random_word(seed + 1, i) % 64) {
    case 0:
        return 0;
    case 1:
        return -0.0;
    case 2:
        return rounded(dtype, x * smallest_of(dtype));
    case 3:
        return x * 0x1p40;
    default:
        return x;
    }
}

/* Fills a[] where the product reads it; everything between stays NaN. Returns the address of row 0, k 0. */
static void *fill_a(const bench *b, const product_case *c, strides a)
{
    const ptrdiff_t to_last_row = (ptrdiff_t)c->rows * a.row - a.row, to_last_k = (ptrdiff_t)c->depth * a.k - a.k;
    const ptrdiff_t lowest = (a.row < 0 ? to_last_row : 0) + (a.k < 0 ? to_last_k : 0);
    const ptrdiff_t highest = (a.row > 0 ? to_last_row : 0) + (a.k > 0 ? to_last_k : 0);
    const bool is_empty = c->rows == 0 || c->depth == 0;
    char *data = buffer(b, 0, is_empty ? 0 : (size_t)(highest - lowest + 1));
    if (is_empty)
        return data;
    data -= lowest * (ptrdiff_t)b->k->size;
    for (size_t r = 0; r < c->rows; r++)
        for (size_t k = 0; k < c->depth; k++)
            put(b->dtype, data, (ptrdiff_t)r * a.row + (ptrdiff_t)k * a.k, operand(b->dtype, 1, r * c->depth + k));
    return data;
}

/* A matrix [rows][width] whose rows are width + gap apart, the gaps NaN. */
static void *fill_rows(const bench *b, size_t slot, size_t rows, size_t width, size_t gap, uint64_t seed)
{
    const size_t stride = width + gap;
    void *x = buffer(b, slot, rows ? rows * stride - gap : 0);
    for (size_t r = 0; r < rows; r++)
        for (size_t lane = 0; lane < width; lane++)
            put(b->dtype, x, (ptrdiff_t)(r * stride + lane), operand(b->dtype, seed, r * width + lane));
    return x;
}

static mha_product fill_product(const bench *b, const product_case *c)
{
    const strides a = layout_of(c);
    const size_t width = c->panels * b->P, stride = width + c->gap, b_k = b->P + c->gap;
    mha_product p = {.rows = c->rows, .depth = c->depth, .vectors = b->vectors, .a_row = a.row, .a_k = a.k,
                     .b_k = b_k, .more_panels = c->panels - 1, .b_panel_bytes = c->depth * b_k * b->k->size,
                     .c_row = stride};
    static mha_prefetch prefetch; /* only a hint */
    prefetch = (mha_prefetch){.data = (const char *)(uintptr_t)64, .rows = 1, .bytes = 130, .stride_bytes = 4096};
    if (c->prefetched == SOME_ROWS)
        prefetch.rows = c->rows / 2;
    else if (c->prefetched != A_SHORT_ROW)
        prefetch.bytes = c->rows * c->depth * (c->prefetched == A_ROW ? 8 : 200);
    p.prefetch = &prefetch;
    p.a = fill_a(b, c, a);
    p.b = fill_rows(b, 1, c->panels * c->depth, b->P, c->gap, 2);
    if (c->addend == IN_PLACE) {
        p.c = fill_rows(b, 2, c->rows, width, c->gap, 3);
        p.addend = p.c;
        p.addend_row = stride;
    } else {
        p.c = buffer(b, 2, c->rows ? c->rows * stride - c->gap : 0);
        p.addend = c->addend == NO_ADDEND ? NULL
                                          : fill_rows(b, 3, c->addend == ONE_ROW ? 1 : c->rows, width, c->gap, 3);
        p.addend_row = c->addend == ONE_ROW ? 0 : stride;
    }
    p.factor = c->has_factor ? fill_rows(b, 4, 1, width, 0, 4) : NULL;
    return p;
}

/* What kernels.h says of a number of a row of c, one operation at a time; *bound is how far two roundings per FMA can lead away from it. */
static double expected_product(const bench *b, const mha_product *p, size_t r, size_t lane, double *bound)
{
    const mha_dtype t = b->dtype;
    const void *panel = (const char *)p->b + lane / b->P * p->b_panel_bytes;
    double chain = 0, size = 0;
    for (size_t k = 0; k < p->depth; k++) {
        const double x = get(t, p->a, (ptrdiff_t)r * p->a_row + (ptrdiff_t)k * p->a_k);
        const double y = get(t, panel, (ptrdiff_t)(k * p->b_k + lane % b->P));
        chain = fused(t, x, y, chain);
        size += fabs(x * y);
    }
    if (p->addend) {
        const double addend = get(t, p->addend, (ptrdiff_t)(r * p->addend_row + lane));
        const double factor = p->factor ? get(t, p->factor, (ptrdiff_t)lane) : 1;
        chain = p->factor ? fused(t, addend, factor, chain) : rounded(t, addend + chain);
        size += fabs(addend * factor);
    }
    *bound = (double)(p->depth + 2) * (eps_of(t) * size + smallest_of(t));
    return chain;
}

/* The same product by halves. The numbers of b, which are still there, become their values. */
static mha_product by_halves(const bench *b, const product_case *c, const mha_product *p)
{
    mha_product halves = *p;
    const size_t rows = c->panels * c->depth, count = rows ? rows * p->b_k - c->gap : 0;
    uint16_t *bits = guarded_buffer(5, count * sizeof *bits, b->side);
    for (size_t k = 0; k < rows; k++)
        for (size_t lane = 0; lane < b->P; lane++) {
            const size_t i = k * p->b_k + lane;
            bits[i] = (uint16_t)nearest_half(c->b_type, get(b->dtype, p->b, (ptrdiff_t)i));
            put(b->dtype, guarded_slots[1].data, (ptrdiff_t)i, half_value(c->b_type, bits[i]));
        }
    halves.b = bits;
    halves.b_panel_bytes = c->depth * p->b_k * sizeof *bits;
    halves.b_type = c->b_type;
    return halves;
}

static void check_product(const bench *b, const product_case *c)
{
    static double expected[MAX_ROWS][MAX_WIDTH], bound[MAX_ROWS][MAX_WIDTH];
    const size_t width = c->panels * b->P;
    const mha_product p = fill_product(b, c), asked = mha_is_half(c->b_type) ? by_halves(b, c, &p) : p;
    DESCRIBE("%s %s product by %s, %zu panels of %zu vectors, %zu rows, depth %zu, layout %zu, addend %d, factor %d, "
             "gap %zu, at the %s", b->k->name, dtype_name(b->dtype),
             dtype_name(mha_is_half(c->b_type) ? c->b_type : b->dtype), c->panels, b->vectors, c->rows, c->depth,
             c->layout, (int)c->addend, c->has_factor, c->gap, b->side == AT_END ? "end" : "start");
    for (size_t r = 0; r < c->rows; r++)
        for (size_t lane = 0; lane < width; lane++)
            expected[r][lane] = expected_product(b, &p, r, lane, &bound[r][lane]);
    b->k->product(&asked);
    for (size_t r = 0; r < c->rows; r++) {
        for (size_t lane = 0; lane < width; lane++) {
            const double got = get(b->dtype, p.c, (ptrdiff_t)(r * p.c_row + lane));
            if (b->has_fma)
                CHECK_SAME(got, expected[r][lane], r, lane);
            else
                CHECK(identical(got, expected[r][lane]) || fabs(got - expected[r][lane]) <= bound[r][lane],
                      "%a instead of %a, more than %a off", got, expected[r][lane], bound[r][lane]);
        }
        if (r + 1 < c->rows)
            CHECK(all_canaries((unsigned char *)p.c + (r * p.c_row + width) * b->k->size, c->gap * b->k->size),
                  "wrote between rows %zu and %zu", r, r + 1);
    }
    for (size_t slot = 0; slot < 5; slot++)
        CHECK(!guarded_slots[slot].first || guarded_intact(slot), "wrote beside buffer %zu", slot);
}

/* Every combination of options for one ragged size, then some combination for every size. */
static void test_product(const bench *b)
{
    static const size_t rows[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 17, 97};
    static const size_t depths[] = {0, 1, 2, 5, 64, 129, 130, 131};
    for (size_t layout = 0; layout < LAYOUTS; layout++)
        for (int addend = 0; addend < ADDENDS; addend++)
            for (size_t i = 0; i < 4; i++)
                check_product(b, &(product_case){11, 7, layout, i % 2 ? 3 : 0, (addend_kind)addend, i / 2 != 0,
                                                 SOME_ROWS, 1, 0});
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
        for (size_t d = 0; d < sizeof depths / sizeof *depths; d++)
            for (int prefetched = 0; prefetched < PREFETCHED; prefetched++)
                for (size_t panels = 1; panels <= most_panels(b->vectors, rows[r]); panels++) {
                    const uint64_t word = random_word(r * 100 + d, (uint64_t)prefetched + panels * 100);
                    product_case c = {rows[r], depths[d], word % LAYOUTS, word >> 8 & 1 ? 3 : 0,
                                      (addend_kind)(word >> 16) % ADDENDS, word >> 24 & 1,
                                      (prefetched_kind)prefetched, panels, 0};
                    check_product(b, &c);
                    for (int half = MHA_BFLOAT16; b->dtype == MHA_FLOAT32 && half <= MHA_FLOAT16; half++) {
                        c.b_type = (mha_dtype)half;
                        check_product(b, &c);
                    }
                }
}

/* ---- Panels in and out ---- */

static const size_t widths[] = {0, 1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 130};
enum { WIDTHS = sizeof widths / sizeof *widths };

static void check_pack(const bench *b, size_t count, size_t width, size_t gap, double scale)
{
    const mha_dtype t = b->dtype;
    const size_t stride = width + gap;
    const void *rows = random_buffer(b, 0, count ? count * stride - gap : 0, width);
    void *panel = buffer(b, 1, width * b->P);
    DESCRIBE("%s %s pack_panel, %zu vectors, %zu rows of %zu, gap %zu", b->k->name, dtype_name(t), b->vectors, count,
             width, gap);
    b->k->pack_panel(rows, stride, count, width, scale, panel, b->vectors);
    for (size_t d = 0; d < width; d++)
        for (size_t lane = 0; lane < b->P; lane++) {
            const double wanted =
                lane < count ? rounded(t, get(t, rows, (ptrdiff_t)(lane * stride + d)) * rounded(t, scale)) : 0;
            CHECK_SAME(get(t, panel, (ptrdiff_t)(d * b->P + lane)), wanted, d, lane);
        }
    CHECK(guarded_intact(0) && guarded_intact(1), "wrote beside a buffer");
}

static void check_unpack(const bench *b, size_t count, size_t width, size_t gap)
{
    const mha_dtype t = b->dtype;
    const size_t stride = width + gap;
    const void *panel = random_buffer(b, 0, width * b->P, width), *factor = random_buffer(b, 1, b->P, 7);
    char *rows = buffer(b, 2, count ? count * stride - gap : 0);
    DESCRIBE("%s %s unpack_panel, %zu vectors, %zu rows of %zu, gap %zu", b->k->name, dtype_name(t), b->vectors,
             count, width, gap);
    b->k->unpack_panel(panel, b->vectors, factor, count, width, rows, stride);
    for (size_t lane = 0; lane < count; lane++) {
        for (size_t d = 0; d < width; d++) {
            const double x = get(t, panel, (ptrdiff_t)(d * b->P + lane)), f = get(t, factor, (ptrdiff_t)lane);
            CHECK_SAME(get(t, rows, (ptrdiff_t)(lane * stride + d)), rounded(t, x * f), lane, d);
        }
        if (lane + 1 < count)
            CHECK(all_canaries((unsigned char *)rows + (lane * stride + width) * b->k->size, gap * b->k->size),
                  "wrote behind row %zu", lane);
    }
    CHECK(guarded_intact(0) && guarded_intact(1) && guarded_intact(2), "wrote beside a buffer");
}

static void test_panels(const bench *b)
{
    for (size_t i = 0; i < WIDTHS; i++)
        for (size_t count = 0; count <= b->P; count += count < 3 || count + 3 > b->P ? 1 : 5)
            for (size_t gap = 0; gap < 6; gap += 5) {
                check_pack(b, count, widths[i], gap, 0.3);
                check_unpack(b, count, widths[i], gap);
            }
    check_pack(b, b->P, 19, 0, 1);
}

/* ---- Masks ---- */

/* A mask in a buffer of its own, a row for each lane, whatever the strides in bytes. */
typedef struct {
    mha_mask_kind kind;
    ptrdiff_t stride_lane, stride_s;
    const char *data;
} mask_case;

static double mask_number(mha_mask_kind kind, const char *at)
{
    if (kind == MHA_MASK_HIDE || kind == MHA_MASK_SHOW)
        return (*at != 0) == (kind == MHA_MASK_HIDE) ? -INFINITY : 0;
    return get_at(kind == MHA_MASK_FLOAT32 ? MHA_FLOAT32 : MHA_FLOAT64, at);
}

static void put_mask_number(mha_mask_kind kind, char *at, uint64_t word)
{
    static const double special[] = {0, -INFINITY, -FLT_MAX, -DBL_MAX, 0.1, -3, NAN, INFINITY};
    const double x = word % 10 < 8 ? special[word % 10] : (double)(word >> 44) * 0x1p-18;
    if (kind == MHA_MASK_FLOAT64)
        put_at(MHA_FLOAT64, at, x);
    else if (kind == MHA_MASK_FLOAT32)
        put_at(MHA_FLOAT32, at, x < -FLT_MAX ? -INFINITY : x);
    else
        *at = (char)(word % 3);
}

static size_t key_index(const mha_mask_block *m, size_t i)
{
    return m->index ? m->index[i] : m->first_key + i;
}

/* Makes the rows of `lanes` lanes; data is where lane 0 has key 0 of the whole item. `uniform`: all numbers alike. */
static void make_mask(const bench *b, size_t slot, mask_case *mask, size_t lanes, size_t keys, const mha_mask_block *m,
                      bool uniform)
{
    const size_t size = mask->kind == MHA_MASK_FLOAT64 ? 8 : mask->kind == MHA_MASK_FLOAT32 ? 4 : 1;
    ptrdiff_t lowest = PTRDIFF_MAX, highest = PTRDIFF_MIN;
    for (size_t l = 0; l < lanes; l++)
        for (size_t i = 0; i < keys; i++) {
            const ptrdiff_t at = (ptrdiff_t)l * mask->stride_lane + (ptrdiff_t)key_index(m, i) * mask->stride_s;
            lowest = at < lowest ? at : lowest;
            highest = at > highest ? at : highest;
        }
    char *data = (char *)guarded_buffer(slot, (size_t)(highest - lowest) + size, b->side) - lowest;
    for (size_t l = 0; l < lanes; l++)
        for (size_t i = 0; i < keys; i++)
            put_mask_number(mask->kind,
                            data + (ptrdiff_t)l * mask->stride_lane + (ptrdiff_t)key_index(m, i) * mask->stride_s,
                            uniform ? slot + keys % 2 : random_word(slot, l * keys + i));
    mask->data = data;
}

static double expected_bias(const bench *b, const mha_mask_block *m, size_t i, size_t lane)
{
    const size_t s = key_index(m, i);
    double attn = 0, padding = 0;
    if (m->attn_kind)
        attn = rounded(b->dtype, mask_number(m->attn_kind, m->attn[lane] + (ptrdiff_t)s * m->attn_s_bytes));
    if (m->padding_kind)
        padding = rounded(b->dtype, mask_number(m->padding_kind, m->padding + (ptrdiff_t)s * m->padding_s_bytes));
    if (attn == -INFINITY || padding == -INFINITY || (m->is_causal && s > m->query[lane]))
        return -INFINITY;
    return rounded(b->dtype, attn + padding);
}

static void check_masks(const bench *b, size_t keys, size_t count, mha_mask_block m, mask_case attn, mask_case of_keys,
                        bool uniform)
{
    size_t wanted_keys = 0, zeros = 0;
    DESCRIBE("%s %s read_masks, %zu vectors, %zu keys, %zu lanes, kinds %d (%td, %td) and %d (%td), index %d, "
             "causal %d, uniform %d", b->k->name, dtype_name(b->dtype), b->vectors, keys, count, (int)attn.kind,
             attn.stride_lane, attn.stride_s, (int)of_keys.kind, of_keys.stride_s, m.index != NULL, m.is_causal,
             uniform);
    make_mask(b, 1, &attn, count, keys, &m, uniform);
    make_mask(b, 2, &of_keys, 1, keys, &m, uniform);
    m.attn_kind = attn.kind;
    m.padding_kind = of_keys.kind;
    m.attn_s_bytes = attn.stride_s;
    m.padding_s_bytes = of_keys.stride_s;
    m.padding = of_keys.data;
    for (size_t lane = 0; lane < count; lane++) {
        m.attn[lane] = attn.data + (ptrdiff_t)lane * attn.stride_lane;
        m.query[lane] += lane / 3 * 7;
    }
    void *bias = buffer(b, 0, MHA_BLOCK_KEYS * b->P);
    const mha_visible visible = b->k->read_masks(bias, keys, b->vectors, count, &m);
    for (size_t i = 0; i < keys; i++)
        for (size_t lane = 0; lane < b->P; lane++) {
            const double wanted = expected_bias(b, &m, i, lane < count ? lane : count - 1);
            if (i < visible.keys) /* no bias stands for 0 */
                CHECK_SAME(visible.is_biased ? get(b->dtype, bias, (ptrdiff_t)(i * b->P + lane)) : 0, wanted, i, lane);
            if (wanted != -INFINITY)
                wanted_keys = i + 1;
            zeros += wanted == 0;
        }
    CHECK(visible.keys == wanted_keys, "%zu keys in view instead of %zu", visible.keys, wanted_keys);
    CHECK(zeros < keys * b->P || !visible.is_biased, "zeros are a bias");
    CHECK(guarded_intact(0) && guarded_intact(1) && guarded_intact(2), "wrote beside a buffer");
}

static void test_masks(const bench *b)
{
    static const size_t keys[] = {1, 2, 5, 16, 63, 64};
    static const mask_case masks[] = {
        {MHA_MASK_NONE, 0, 0, NULL},        {MHA_MASK_HIDE, 200, 1, NULL},    {MHA_MASK_HIDE, 0, 3, NULL},
        {MHA_MASK_HIDE, -1, 64, NULL},      {MHA_MASK_SHOW, 200, 1, NULL},    {MHA_MASK_SHOW, 1, 99, NULL},
        {MHA_MASK_FLOAT32, 900, 4, NULL},   {MHA_MASK_FLOAT32, 4, 1001, NULL}, {MHA_MASK_FLOAT32, 2000, -5, NULL},
        {MHA_MASK_FLOAT32, 7, 0, NULL},     {MHA_MASK_FLOAT64, 2000, 8, NULL}, {MHA_MASK_FLOAT64, -9, 999, NULL},
        {MHA_MASK_FLOAT64, 0, 0, NULL},     {MHA_MASK_FLOAT64, 2000, 4, NULL},
    };
    enum { MASKS = sizeof masks / sizeof *masks };
    static size_t index[MHA_BLOCK_KEYS];
    for (size_t i = 0; i < MHA_BLOCK_KEYS; i++)
        index[i] = 3 + 2 * i + i / 7;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        for (size_t attn = 0; attn < MASKS; attn++)
            for (size_t of_keys = 0; of_keys < MASKS; of_keys++) {
                if (masks[of_keys].kind == MHA_MASK_HIDE || masks[of_keys].kind == MHA_MASK_SHOW)
                    continue; /* only numbers come here */
                const uint64_t word = random_word(attn, of_keys * 10 + i);
                const size_t count = word % 3 ? b->P - (word >> 8) % b->P : b->P;
                mha_mask_block m = {.index = word >> 16 & 1 ? index : NULL, .first_key = word >> 24 & 1 ? 5 : 0,
                                    .is_causal = word >> 40 & 1};
                for (size_t lane = 0; lane < count; lane++)
                    m.query[lane] = (word >> 32) % 70;
                check_masks(b, keys[i], count, m, masks[attn], masks[of_keys], word >> 48 & 1);
            }
}

/* ---- Sums, totals, constants ---- */

static void test_softmax_end(const bench *b)
{
    static const double sums[] = {0, 1, 3, 0.5, 1e10, NAN, INFINITY};
    describe(b, "softmax_end");
    for (int empty = 0; empty < 2; empty++) {
        double before[MAX_LANES];
        void *sum = buffer(b, 0, b->P), *inverse = buffer(b, 1, b->P);
        for (size_t lane = 0; lane < b->P; lane++) {
            before[lane] = rounded(b->dtype, lane < 7 ? sums[lane] : 1 + fabs(random_number(b->dtype, 1, lane)));
            put(b->dtype, sum, (ptrdiff_t)lane, before[lane]);
        }
        b->k->softmax_end(sum, inverse, b->vectors, empty ? MHA_EMPTY_ROW_NAN : MHA_EMPTY_ROW_ZERO);
        for (size_t lane = 0; lane < b->P; lane++) {
            const double wanted = before[lane] == 0 ? (empty ? NAN : 1) : before[lane];
            CHECK_SAME(get(b->dtype, sum, (ptrdiff_t)lane), wanted, lane, empty);
            CHECK_SAME(get(b->dtype, inverse, (ptrdiff_t)lane), rounded(b->dtype, 1 / wanted), lane, empty);
        }
        CHECK(guarded_intact(0) && guarded_intact(1), "wrote beside a buffer");
    }
}

static void test_add_and_fill(const bench *b)
{
    describe(b, "add");
    for (size_t n = 0; n < 4 * b->k->lanes; n++) {
        void *total = random_buffer(b, 0, n, 1), *x = random_buffer(b, 1, n, 2);
        b->k->add(total, total, x, n);
        for (size_t i = 0; i < n; i++)
            CHECK_SAME(get(b->dtype, total, (ptrdiff_t)i),
                       rounded(b->dtype, random_number(b->dtype, 1, i) + random_number(b->dtype, 2, i)), i, n);
        CHECK(guarded_intact(0) && guarded_intact(1), "wrote beside a buffer");
    }
    describe(b, "fill");
    for (size_t n = 0; n < 70; n++) {
        void *x = buffer(b, 0, n);
        const double value = n % 2 ? -INFINITY : 1 / 3.0;
        b->k->fill(x, n, value);
        for (size_t i = 0; i < n; i++)
            CHECK_SAME(get(b->dtype, x, (ptrdiff_t)i), rounded(b->dtype, value), i, n);
        CHECK(guarded_intact(0), "wrote beside the buffer");
    }
}

/* One bad number in each place, or the largest there are, in each place. */
static void test_is_finite(const bench *b)
{
    static const double bad[] = {NAN, INFINITY, -INFINITY};
    describe(b, "is_finite");
    for (size_t n = 0; n < 5 * b->k->lanes + 3; n++) {
        void *x = buffer(b, 0, n);
        for (size_t i = 0; i < n; i++)
            put(b->dtype, x, (ptrdiff_t)i, (i % 2 ? -1 : 1) * (b->dtype == MHA_FLOAT32 ? (double)FLT_MAX : DBL_MAX));
        CHECK(b->k->is_finite(x, n), "%zu finite numbers", n);
        for (size_t i = 0; i < n; i++) {
            const double kept = get(b->dtype, x, (ptrdiff_t)i);
            put(b->dtype, x, (ptrdiff_t)i, bad[(i + n) % 3]);
            CHECK(!b->k->is_finite(x, n), "number %zu of %zu", i, n);
            put(b->dtype, x, (ptrdiff_t)i, kept);
        }
        CHECK(guarded_intact(0), "wrote to the buffer's side");
    }
}

/* ---- Dropout ---- */

static const uint32_t dropout_key[2] = {0x243f6a88, 0x85a308d3};

/* The weights of `keys` keys by `count` queries after dropout, as multiples of what they were. */
static void drop(const bench *b, size_t keys, size_t count, const mha_dropout_block *block,
                 double result[MHA_BLOCK_KEYS][MAX_LANES])
{
    void *weights = buffer(b, 0, keys * b->P);
    for (size_t i = 0; i < keys * b->P; i++)
        put(b->dtype, weights, (ptrdiff_t)i, (double)(1 + i));
    b->k->dropout(weights, keys, b->vectors, count, block);
    for (size_t i = 0; i < keys; i++)
        for (size_t lane = 0; lane < count; lane++) {
            const double x = get(b->dtype, weights, (ptrdiff_t)(i * b->P + lane));
            result[i][lane] = x / (double)(1 + i * b->P + lane);
        }
    CHECK(guarded_intact(0), "wrote beside the buffer");
}

/* Each weight is scaled or 0, in the right proportion, and its fate is its own: not the block's, not the lane's. */
static void test_dropout(const bench *b)
{
    static double whole[MHA_BLOCK_KEYS][MAX_LANES], part[MHA_BLOCK_KEYS][MAX_LANES];
    static size_t index[MHA_BLOCK_KEYS];
    size_t kept = 0, all = 0;
    mha_dropout_block block = {.key = dropout_key, .threshold = 3u << 30, .scale = 4 / 3.0, .n = 2, .h = 3,
                               .first_query = 40, .first_key = 128};
    describe(b, "dropout");
    drop(b, MHA_BLOCK_KEYS, b->P, &block, whole);
    for (size_t i = 0; i < MHA_BLOCK_KEYS; i++)
        for (size_t lane = 0; lane < b->P; lane++) {
            CHECK(whole[i][lane] == 0 || fabs(whole[i][lane] * 0.75 - 1) < 4 * eps_of(b->dtype), "factor %a",
                  whole[i][lane]);
            kept += whole[i][lane] != 0;
            all++;
        }
    const double off = ((double)kept - 0.75 * (double)all) / sqrt(0.75 * 0.25 * (double)all);
    CHECK(fabs(off) < 5, "%zu of %zu kept, %g sigma from 3/4", kept, all, off);
    for (size_t i = 0; i < 13; i++)
        index[i] = 129 + 4 * i + i % 2;
    block.index = index;
    block.first_query = 41;
    drop(b, 13, b->P - 1, &block, part);
    for (size_t i = 0; i < 13; i++)
        for (size_t lane = 0; lane + 1 < b->P; lane++)
            CHECK((part[i][lane] == 0) == (whole[index[i] - 128][lane + 1] == 0), "query %zu, key %zu", 41 + lane,
                  index[i]);
    for (int every = 0; every < 2; every++) {
        block.threshold = every ? (uint64_t)1 << 32 : 0;
        drop(b, 13, b->P, &block, part);
        for (size_t i = 0; i < 13; i++)
            for (size_t lane = 0; lane < b->P; lane++)
                CHECK((part[i][lane] != 0) == every, "threshold %d: %a", every, part[i][lane]);
    }
}

/* Known answers, from the authors' own tests. */
static void test_philox(void)
{
    static const uint32_t answers[3][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
         0x24126ea1},
    };
    DESCRIBE("philox");
    for (size_t i = 0; i < 3; i++) {
        const uint32_t *a = answers[i];
        const mha_philox_block random = mha_philox(a + 4, a[0], a[1], a[2], a[3]);
        CHECK(memcmp(random.word, a + 6, sizeof random.word) == 0, "known answer %zu", i);
    }
}

/* ---- A handful of tokens ---- */

/* The same attention, by one kernel after another: rows [queries][Dv]. */
static void attend_step_by_step(const bench *b, const mha_handful *h, char *rows)
{
    const size_t size = b->k->size, lanes = b->k->lanes, most = MHA_HANDFUL * lanes;
    char *steps = buffer(b, 5, 3 * most + 3 * lanes);
    char *panel = steps, *scores = panel + most * size, *sums = scores + most * size, *maximum = sums + most * size;
    char *sum = maximum + lanes * size, *factor = sum + lanes * size;
    const mha_product to_scores = {.rows = h->keys, .depth = h->D, .vectors = 1, .a = h->k, .a_row = h->k_row, .a_k = 1,
                                   .b = panel, .b_k = lanes, .c = scores, .c_row = lanes};
    const mha_product to_sums = {.rows = h->Dv, .depth = h->keys, .vectors = 1, .a = h->v, .a_row = 1, .a_k = h->v_row,
                                 .b = scores, .b_k = lanes, .c = sums, .c_row = lanes};
    for (size_t first = 0; first < h->queries; first += lanes) {
        const size_t count = h->queries - first < lanes ? h->queries - first : lanes;
        b->k->pack_panel((const char *)h->q + first * (size_t)h->q_row * size, (size_t)h->q_row, count, h->D, h->scale,
                         panel, 1);
        b->k->product(&to_scores);
        b->k->softmax_begin(maximum, sum, 1);
        b->k->softmax_step(scores, h->keys, 1, scores, maximum, sum, factor);
        b->k->product(&to_sums);
        b->k->softmax_end(sum, factor, 1, h->empty_row);
        b->k->unpack_panel(sums, 1, factor, count, h->Dv, rows + first * h->Dv * size, h->Dv);
    }
}

static void check_handful(const bench *b, size_t queries, size_t keys, size_t D, size_t Dv, size_t gap, double spoilt)
{
    const mha_dtype t = b->dtype;
    const size_t size = b->k->size;
    mha_handful h = {.queries = queries, .keys = keys, .D = D, .Dv = Dv, .q_row = (ptrdiff_t)(D + gap),
                     .k_row = (ptrdiff_t)(D + 2 * gap), .v_row = (ptrdiff_t)(Dv + gap),
                     .context_row = (ptrdiff_t)(Dv + gap), .scale = 0.3,
                     .empty_row = gap ? MHA_EMPTY_ROW_NAN : MHA_EMPTY_ROW_ZERO};
    DESCRIBE("%s %s attend_handful, %zu queries of %zu, %zu keys of %zu, gap %zu, %a", b->k->name, dtype_name(t),
             queries, D, keys, Dv, gap, spoilt);
    h.q = random_buffer(b, 0, queries * (D + gap) - gap, 1);
    h.k = random_buffer(b, 1, keys ? keys * (D + 2 * gap) - 2 * gap : 0, 2);
    void *v = random_buffer(b, 2, keys ? keys * (Dv + gap) - gap : 0, 3);
    h.v = v;
    h.context = buffer(b, 3, queries * (Dv + gap) - gap);
    if (spoilt != 0 && keys > 0)
        put(t, v, (ptrdiff_t)((keys - 1) * (Dv + gap)), spoilt);
    char *wanted = buffer(b, 4, queries * Dv);
    attend_step_by_step(b, &h, wanted);
    b->k->attend_handful(&h);
    for (size_t l = 0; l < queries; l++) {
        for (size_t d = 0; d < Dv; d++)
            CHECK_SAME(get(t, h.context, (ptrdiff_t)(l * (Dv + gap) + d)), get(t, wanted, (ptrdiff_t)(l * Dv + d)), l,
                       d);
        if (l + 1 < queries)
            CHECK(all_canaries((unsigned char *)h.context + (l * (Dv + gap) + Dv) * size, gap * size),
                  "wrote behind row %zu", l);
    }
    for (size_t slot = 0; slot < 6; slot++)
        CHECK(guarded_intact(slot), "wrote beside buffer %zu", slot);
}

static void test_handful(const bench *b)
{
    static const size_t some[] = {1, 2, 3, 5, 8, 13, 16};
    enum { SOME = sizeof some / sizeof *some };
    for (size_t i = 0; i < SOME * SOME * SOME && b->vectors == 1; i++) {
        const size_t queries = some[i % SOME], D = some[i / SOME % SOME], Dv = some[i / SOME / SOME];
        for (size_t keys = 0; keys <= MHA_HANDFUL; keys += 1 + i % 3)
            check_handful(b, queries, keys, D, Dv, i % 2 * 3, 0);
        check_handful(b, queries, 1 + i % MHA_HANDFUL, D, Dv, 0, i % 2 ? NAN : INFINITY);
    }
}

/* ---- Activations ---- */

enum { SAMPLES = 1 << 12 };

/* By libm, in the widest type. Where a tail is near 0, no digits cancel. */
static long double activated(mha_activation activation, long double x, long double *exponent)
{
    const long double u = sqrtl(2 / acosl(-1)) * (x + 0.044715L * x * x * x);
    const long double z = activation == MHA_GELU_TANH ? 2 * u : activation == MHA_QUICK_GELU ? 1.702L * x : x;
    *exponent = activation == MHA_RELU ? 0 : activation == MHA_GELU ? x * x / 2 : z;
    if (activation == MHA_RELU)
        return x > 0 ? x : 0;
    return activation == MHA_GELU ? x * erfcl(-x / sqrtl(2)) / 2 : x / (1 + expl(-z));
}

/* An exponent is rounded up to four times. Each rounding changes the exponential by half as many units as the exponent
 * is large. An exponential that underflows is 0. */
static void check_activated(const bench *b, mha_activation activation, double x, double factor, double got)
{
    long double exponent;
    const long double exact = activated(activation, (long double)x, &exponent) * (long double)factor;
    const long double units = activation == MHA_RELU ? 0 : 4 + 2 * fabsl(exponent);
    const long double unit = (long double)eps_of(b->dtype);
    const long double least = (long double)(smallest_of(b->dtype) * (1 + fabs(x)) * (1 + fabs(factor)));
    if (factor == 1 && units == 0)
        CHECK(got == (double)exact, "%a becomes %a instead of %a", x, got, (double)exact);
    else
        CHECK(fabsl((long double)got - exact) <= (units + 1) * unit * fabsl(exact) + least,
              "%a becomes %a instead of %a", x, got, (double)exact);
}

/* Of any size, from 2^-40 to 2^7, of both signs. */
static double sample(const bench *b, size_t i)
{
    const double x = random_number(b->dtype, 70, i);
    return rounded(b->dtype, i % 2 ? x * 16 : ldexp(x, (int)(random_word(71, i) % 47) - 39));
}

/* Rows of 0 numbers to three vectors and more, with a factor or without; every number has its own place. */
static void check_rows_activated(const bench *b, mha_activation activation, bool has_factor)
{
    for (size_t n = 0, first = 0; first < SAMPLES; n = (n + 1) % (3 * b->k->lanes + 2), first += n) {
        char *x = buffer(b, 0, n);
        const void *factor = has_factor ? random_buffer(b, 1, n, 72) : NULL;
        for (size_t i = 0; i < n; i++)
            put(b->dtype, x, (ptrdiff_t)i, sample(b, first + i));
        DESCRIBE("%s %s activation %d of %zu numbers, factor %d", b->k->name, dtype_name(b->dtype), (int)activation, n,
                 has_factor);
        b->k->activate(activation, x, factor, n);
        for (size_t i = 0; i < n; i++)
            check_activated(b, activation, sample(b, first + i), factor ? get(b->dtype, factor, (ptrdiff_t)i) : 1,
                            get(b->dtype, x, (ptrdiff_t)i));
        CHECK(guarded_intact(0) && (!has_factor || guarded_intact(1)), "wrote beside a buffer");
    }
}

/* The n-th number alone: what comes out does not depend on its place. */
static double activate_alone(const bench *b, mha_activation activation, double x)
{
    char *number = buffer(b, 0, 1);
    put(b->dtype, number, 0, x);
    b->k->activate(activation, number, NULL, 1);
    return get(b->dtype, number, 0);
}

/* NaN stays NaN, infinity and zeros stay, minus infinity becomes 0, and small numbers keep their digits. */
static void check_special_numbers(const bench *b, mha_activation activation)
{
    const double tiny = smallest_of(b->dtype), least = tiny * eps_of(b->dtype), large = -lowest_of(b->dtype);
    const double specials[] = {0, -0.0, tiny, -tiny, least, -least, tiny / 8, -tiny / 8};
    DESCRIBE("%s %s activation %d", b->k->name, dtype_name(b->dtype), (int)activation);
    CHECK(isnan(activate_alone(b, activation, NAN)), "NaN is lost");
    CHECK(activate_alone(b, activation, INFINITY) == INFINITY, "infinity is lost");
    CHECK(activate_alone(b, activation, large) == large, "%a", activate_alone(b, activation, large));
    CHECK(activate_alone(b, activation, -INFINITY) == 0, "%a", activate_alone(b, activation, -INFINITY));
    CHECK(activate_alone(b, activation, -large) == 0, "%a", activate_alone(b, activation, -large));
    CHECK(!signbit(activate_alone(b, activation, 0)) && signbit(activate_alone(b, activation, -0.0)),
          "a zero has another sign");
    for (size_t i = 0; i < sizeof specials / sizeof *specials; i++) {
        const double x = specials[i], got = activate_alone(b, activation, x);
        const double wanted = activation == MHA_RELU ? (x > 0 ? x : 0) : x / 2;
        CHECK(fabs(got - wanted) <= least, "%a becomes %a instead of %a", x, got, wanted);
    }
}

static void test_activations(const bench *b)
{
    for (int activation = MHA_RELU; b->vectors == 1 && activation <= MHA_QUICK_GELU; activation++) {
        check_rows_activated(b, (mha_activation)activation, false);
        check_rows_activated(b, (mha_activation)activation, true);
        check_special_numbers(b, (mha_activation)activation);
    }
}

/* ---- Halves ---- */

static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* All halves, in rows of 0 to three vectors and more. */
static void check_widened(const bench *b, mha_dtype half)
{
    for (unsigned first = 0, n = 0; first < 1 << 16; first += n, n = (n + 1) % (3 * (unsigned)b->k->lanes + 2)) {
        n = first + n > 1 << 16 ? (1 << 16) - first : n;
        uint16_t *halves = guarded_buffer(0, n * sizeof *halves, b->side);
        float *numbers = guarded_buffer(1, n * sizeof *numbers, b->side);
        for (unsigned i = 0; i < n; i++)
            halves[i] = (uint16_t)(first + i);
        DESCRIBE("%s widens %s from %#x on", b->k->name, dtype_name(half), first);
        b->k->widen(half, halves, n, numbers);
        for (unsigned i = 0; i < n; i++) {
            const double wanted = half_value(half, first + i);
            const uint32_t payload = (first + i) << (23 - fraction_bits(half)) & 0x7fffff, bits = bits_of(numbers[i]);
            CHECK_SAME((double)numbers[i], wanted, i, n);
            CHECK(!isnan(wanted) || ((bits & 0x3fffff) == (payload & 0x3fffff) && bits >> 31 == (first + i) >> 15),
                  "%#x becomes %#x", first + i, (unsigned)bits);
        }
        CHECK(guarded_intact(0) && guarded_intact(1), "wrote beside a buffer");
    }
}

static void check_narrowed(const bench *b, mha_dtype half, const float *numbers, size_t n)
{
    float *from = guarded_buffer(0, n * sizeof *from, b->side);
    uint16_t *halves = guarded_buffer(1, n * sizeof *halves, b->side);
    memcpy(from, numbers, n * sizeof *from);
    b->k->narrow(half, from, n, halves);
    for (size_t i = 0; i < n; i++) {
        const uint32_t bits = bits_of(numbers[i]);
        const int f = fraction_bits(half);
        unsigned wanted = bits >> 16 & 0x8000;
        if (isnan(numbers[i])) /* quiet, with the bits that fit */
            wanted |= ((1u << (15 - f)) - 1) << f | 1u << (f - 1) | (bits >> (23 - f) & ((1u << f) - 1));
        else
            wanted = nearest_half(half, (double)numbers[i]);
        CHECK(halves[i] == wanted, "%a becomes %#x instead of %#x", (double)numbers[i], halves[i], wanted);
    }
    CHECK(guarded_intact(0) && guarded_intact(1), "wrote beside a buffer");
}

/* Between each half and the next: the half, just below the middle, the middle, just above. Then any bits. */
static void check_all_narrowed(const bench *b, mha_dtype half)
{
    float numbers[64];
    DESCRIBE("%s narrows to %s", b->k->name, dtype_name(half));
    for (unsigned first = 0; first < 1 << 16; first += 16) {
        for (unsigned i = 0; i < 16; i++) {
            const double low = half_value(half, first + i), high = half_value(half, first + i + 1);
            const float middle = isfinite(low) && isfinite(high) ? (float)((low + high) / 2) : (float)low;
            numbers[4 * i] = (float)low;
            numbers[4 * i + 1] = float_of(bits_of(middle) - 1);
            numbers[4 * i + 2] = middle;
            numbers[4 * i + 3] = float_of(bits_of(middle) + 1);
        }
        check_narrowed(b, half, numbers, 64);
    }
    for (uint64_t i = 0; i < 1 << 14; i++) {
        for (uint64_t j = 0; j < 64; j++)
            numbers[j] = float_of((uint32_t)random_word(90, i * 64 + j));
        check_narrowed(b, half, numbers, i % 64);
    }
}

static void test_halves(const bench *b)
{
    for (int half = MHA_BFLOAT16; b->vectors == 1 && b->dtype == MHA_FLOAT32 && half <= MHA_FLOAT16; half++) {
        check_widened(b, (mha_dtype)half);
        check_all_narrowed(b, (mha_dtype)half);
    }
}

int main(void)
{
    test_philox();
    on_every_bench(test_product);
    on_every_bench(test_panels);
    on_every_bench(test_masks);
    on_every_bench(test_softmax_end);
    on_every_bench(test_add_and_fill);
    on_every_bench(test_is_finite);
    on_every_bench(test_dropout);
    on_every_bench(test_handful);
    on_every_bench(test_activations);
    on_every_bench(test_halves);
    return check_report("test_kernels");
}
