/* SPDX-License-Identifier: Apache-2.0
 *
 * kernels.inc.h - the kernels, written once over the vocabulary of simd_*.h. kernels.h says what each function does.
 *
 * There is no include guard. The file of an instruction set opens a target region and includes this file once per
 * dtype, after defining
 *   DTYPE     f32 or f64, the suffix of every name of the vocabulary
 *   REAL      float or double
 * Both are undefined at the end. MHA_KERNELS() initialises the table of a dtype. setuptools has no flags per source, so
 * these files need target regions: headers of the system and of the core come before the region, and everything in it
 * is static.
 *
 * Every operation on lanes comes from the vocabulary, or is + - * /, which -ffp-contract=off keeps from being fused. So
 * all instruction sets with a true fma give equal bits.
 */

#ifndef MHA_KERNELS_INC_H
#define MHA_KERNELS_INC_H
#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define V(name) PASTE(name, DTYPE)
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))

enum { VECTORS = 3 };
enum { EXP_VECTORS = 4, EXP_AT_ONCE = REGISTERS / 8 /* vectors that fit into the registers */, LINE_BYTES = 64 };
enum { STORE, ADD, RESCALE }; /* the three ends of a product, see mha_product */

/* Makes the compiler forget how a pointer was computed. Otherwise gcc keeps the addresses of all rows of a tile at
 * once. There are more of them than registers, so it moves some to vector registers, where they wait behind the
 * multiplications. */
#define FORGET(pointer) __asm__("" : "+r"(pointer))

/* See exp(). POWERS: steps between two powers of two. ROUND: 1.5 * 2^mantissa bits + POWERS * exponent bias.
 * EXP_LOWEST: the last number above -126 ln(2), for double -1022 ln(2). */
#define LOG2_E_f32 0x1.715476p+0f
#define LOG2_E_f64 0x1.71547652b82fep+0
#define LN_2_f32 0x1.62e430p-1f
#define LN_2_f64 0x1.62e42fefa39efp-1
#define POWERS_f32 8
#define POWERS_f64 1
#define LOWEST_f32 (-FLT_MAX)
#define LOWEST_f64 (-DBL_MAX)
#define EXP_LOWEST_f32 (-0x1.5d589ep+6f)
#define EXP_LOWEST_f64 (-0x1.6232bdd7abcd2p+9)
#define own_kind_f32 MHA_MASK_FLOAT32 /* of a mask in the kernels' own dtype */
#define own_kind_f64 MHA_MASK_FLOAT64
typedef uint32_t word_f32; /* has as many bits as a number */
typedef uint64_t word_f64;
#define ROUND_f32 (12582912.0f + POWERS_f32 * 127)
#define ROUND_f64 (6755399441055744.0 + POWERS_f64 * 1023)
static const float exp_coefficients_f32[] = {0x1.555658p-3f, 0x1.00087cp-1f};
static const double exp_coefficients_f64[] = {
    0x1.ad596ce39e990p-26, 0x1.28af9b7a144e9p-22, 0x1.71df48d2f650dp-19, 0x1.a01997577efedp-16, 0x1.a01a0111c74b3p-13,
    0x1.6c16c1855d582p-10, 0x1.111111112f93ep-7,  0x1.5555555550197p-5,  0x1.55555555554bap-3,  0x1.000000000000bp-1,
};

#define MHA_KERNELS(isa, suffix, real, kind) \
    { \
        .name = isa, .dtype = kind, .size = sizeof(real), .lanes = PASTE(lanes, suffix), .vectors = VECTORS, \
        .product = PASTE(product, suffix), .pack_panel = PASTE(pack_panel, suffix), \
        .unpack_panel = PASTE(unpack_panel, suffix), .read_masks = PASTE(read_masks, suffix), \
        .softmax_begin = PASTE(softmax_begin, suffix), .softmax_step = PASTE(softmax_step, suffix), \
        .softmax_merge = PASTE(softmax_merge, suffix), \
        .softmax_probabilities = PASTE(softmax_probabilities, suffix), .softmax_end = PASTE(softmax_end, suffix), \
        .accumulate = PASTE(accumulate, suffix), .fill = PASTE(fill, suffix), .is_finite = PASTE(is_finite, suffix), \
        .dropout = PASTE(dropout, suffix), \
    }

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
#ifndef ROWS_OF_MANY
#define ROWS_OF_MANY {ROWS_1, ROWS_2, ROWS_3}
#endif
enum { MAX_ROWS = 8, MAX_FEW_ROWS = 8 };
#define EACH_ROW(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define EACH_ROW_AND(X, y) X(0, y) X(1, y) X(2, y) X(3, y) X(4, y) X(5, y) X(6, y) X(7, y)

static bool is_of_numbers(mha_mask_kind kind)
{
    return kind == MHA_MASK_FLOAT32 || kind == MHA_MASK_FLOAT64;
}

/* ---- Keys that are hidden from one query. Bit i is key i of the block. ---- */

_Static_assert(MHA_BLOCK_KEYS == 64, "a bit of 64 for each key of a block");
_Static_assert(EXP_VECTORS == 4, "softmax_step() adds up four sums");

static uint64_t first_keys(size_t keys)
{
    return keys < MHA_BLOCK_KEYS ? ((uint64_t)1 << keys) - 1 : UINT64_MAX;
}

static uint64_t hidden_by_mask(const mha_mask_block *block, const char *row, size_t keys)
{
    uint64_t bits = 0;
    size_t i = 0;
    if (!block->index && block->attn_s == 1) {
        /* One line is read of each row. The lines are far apart, and the hardware foresees none of them. */
        __builtin_prefetch(row + block->first_key + 2 * MHA_BLOCK_KEYS, 0, 2);
        for (; i + 16 <= keys; i += 16)
            bits |= nonzero(row + block->first_key + i) << i;
    }
    for (; i < keys; i++) {
        const size_t key = block->index ? block->index[i] : block->first_key + i;
        bits |= (uint64_t)(row[(ptrdiff_t)key * block->attn_s] != 0) << i;
    }
    return block->attn_kind == MHA_MASK_HIDE ? bits : ~bits;
}

static uint64_t hidden_by_order(const mha_mask_block *block, size_t query, size_t keys)
{
    size_t seen = keys; /* the numbers of keys ascend */
    if (block->index)
        while (seen > 0 && block->index[seen - 1] > query)
            seen--;
    else if (block->first_key + keys > query + 1)
        seen = block->first_key > query ? 0 : query + 1 - block->first_key;
    return ~first_keys(seen);
}

static uint64_t hidden_keys(const mha_mask_block *block, size_t lane, size_t keys)
{
    uint64_t bits = 0;
    if (block->attn_kind == MHA_MASK_HIDE || block->attn_kind == MHA_MASK_SHOW)
        bits = hidden_by_mask(block, block->attn[lane], keys);
    return block->is_causal ? bits | hidden_by_order(block, block->query[lane], keys) : bits;
}
#endif

#define VEC V(vec)
#define LANES ((size_t)V(lanes))

_Static_assert(LANES <= MHA_MAX_VECTOR_LANES && VECTORS * LANES <= MHA_MAX_LANES, "arrays are that long");
_Static_assert(MHA_BLOCK_KEYS % LANES == 0, "a row of a block of masks is whole vectors");

/* ---- The tile: all multiplication happens here ---- */

/* Ends a chain. `end` is a constant in every copy. */
INLINE void V(finish)(const int end, VEC chain, const REAL *addend, const REAL *factor, REAL *c, size_t lane)
{
    if (end == RESCALE)
        chain = V(fma)(V(load)(addend + lane), V(load)(factor + lane), chain);
    else if (end == ADD)
        chain = V(load)(addend + lane) + chain;
    V(store)(c + lane, chain);
}

/* The rows of a product that are left, and what remains to be prefetched: several rows, or a single one. */
typedef struct {
    const REAL *a, *addend; /* addend may be NULL */
    REAL *c;
    const char *next;  /* several rows: the next one */
    size_t left, each; /* several rows: how many are left, and how many come before each tile */
    const char *ahead; /* a single row: the next byte */
    size_t step; /* a single row: bytes to advance with each k */
} V(progress);

INLINE void V(prefetch)(const mha_prefetch *prefetch, V(progress) *at)
{
    for (size_t i = at->each; i > 0 && at->left > 0; i--) {
        for (size_t byte = 0; byte < prefetch->bytes; byte += LINE_BYTES)
            __builtin_prefetch(at->next + byte, 0, 2);
        at->next += prefetch->stride;
        at->left--;
    }
}

/* Computes one tile. `rows` and `vectors` are constants in every copy.
 *
 * Each sum is a variable of its own, because gcc would keep an array of them in memory. Broadcasts are not loaded
 * before they are used: that would need more registers than there are. Rows of a are addressed from every fourth row,
 * by one, two or three strides.
 *
 * Each step prefetches weights for the next tile. Tiles of four to eight rows prefetch every cache line that a step
 * reads of the panel. Tiles of one to three rows prefetch one line per step and leave the rest to the hardware, except
 * where lines are 96 bytes apart (three AVX2 vectors): there they prefetch nothing, because it would confuse the
 * hardware prefetcher. */
INLINE void V(tile)(const size_t rows, const size_t vectors, const mha_product *p, V(progress) *at)
{
    const ptrdiff_t a_row = p->a_row, a_rows_3 = 3 * a_row, a_k = p->a_k;
    const size_t b_k = p->b_k, step = at->step;
    const REAL *a_0 = at->a, *a_4 = rows > 4 ? a_0 + 4 * a_row : a_0, *b = p->b;
    const char *ahead = at->ahead;
    const VEC zero = V(splat)(0);
    if (rows > 4)
        FORGET(a_4);
#define DECLARE(r) VEC c##r##_0 = zero, c##r##_1 = zero, c##r##_2 = zero;
    EACH_ROW(DECLARE)
    for (size_t k = p->depth; k > 0; k--) {
        VEC b_0 = V(load)(b);
        VEC b_1 = vectors > 1 ? V(load)(b + LANES) : zero;
        VEC b_2 = vectors > 2 ? V(load)(b + 2 * LANES) : zero;
        if (rows == 2 || rows == 3) {
            HOLD(b_0);
            if (vectors > 1)
                HOLD(b_1);
            if (vectors > 2)
                HOLD(b_2);
        }
#define ACCUMULATE(r) \
    if (r < rows) { \
        const VEC a_r = V(broadcast)((r < 4 ? a_0 : a_4) + (r % 4 == 3 ? a_rows_3 : r % 4 * a_row)); \
        c##r##_0 = V(fma)(a_r, b_0, c##r##_0); \
        if (vectors > 1) \
            c##r##_1 = V(fma)(a_r, b_1, c##r##_1); \
        if (vectors > 2) \
            c##r##_2 = V(fma)(a_r, b_2, c##r##_2); \
    }
        EACH_ROW(ACCUMULATE)
        if (rows > 3 || vectors * sizeof(VEC) % LINE_BYTES == 0)
            __builtin_prefetch(ahead, 0, 2);
        if (rows > 3 && vectors * sizeof(VEC) > LINE_BYTES)
            __builtin_prefetch(ahead + LINE_BYTES, 0, 2);
        if (rows > 3 && vectors * sizeof(VEC) > 2 * LINE_BYTES)
            __builtin_prefetch(ahead + 2 * LINE_BYTES, 0, 2);
        ahead += step;
        a_0 += a_k;
        a_4 += a_k;
        b += b_k;
    }
    at->ahead = ahead;
    const REAL *addend = at->addend, *factor = p->factor;
    REAL *c = at->c;
    const size_t addend_row = p->addend_row, c_row = p->c_row;
#define FINISH(r, end) \
    if (r < rows) { \
        V(finish)(end, c##r##_0, addend, factor, c, 0); \
        if (vectors > 1) \
            V(finish)(end, c##r##_1, addend, factor, c, LANES); \
        if (vectors > 2) \
            V(finish)(end, c##r##_2, addend, factor, c, 2 * LANES); \
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
#undef ACCUMULATE
#undef FINISH
    at->a += (ptrdiff_t)rows * p->a_row;
    at->addend = addend;
    at->c = c;
}

/* The copies are not inlined, so that the registers of one do not disturb those of another. */
#define COPY(r, v) \
    NOINLINE void V(tiles_##r##x##v)(const mha_product *p, V(progress) *at, size_t tiles) \
    { \
        for (; tiles > 0; tiles--) { \
            V(prefetch)(p->prefetch, at); \
            V(tile)(r, v, p, at); \
        } \
    }
EACH_TILE_1(COPY)
EACH_TILE_2(COPY)
EACH_TILE_3(COPY)
#undef COPY

static void V(product)(const mha_product *p)
{
#define NAME(r, v) V(tiles_##r##x##v),
    static void (*const copies[VECTORS][MAX_ROWS])(const mha_product *, V(progress) *, size_t) = {
        {EACH_TILE_1(NAME)}, {EACH_TILE_2(NAME)}, {EACH_TILE_3(NAME)}};
#undef NAME
    static const size_t rows_of_few[VECTORS] = {ROWS_1, ROWS_2, ROWS_3}, rows_of_many[VECTORS] = ROWS_OF_MANY;
    if (p->rows == 0)
        return;
    /* A product of few rows waits for its panel, so it reads the panel as rarely as possible. */
    const size_t max_rows = (p->rows > MAX_FEW_ROWS ? rows_of_many : rows_of_few)[p->vectors - 1];
    /* Tiles share the rows evenly: 9 rows are 5 + 4, because a tile of one row has too few sums. */
    size_t tiles = 1, rows = p->rows, larger = 0;
    if (p->rows > max_rows) {
        tiles = (p->rows - 1) / max_rows + 1;
        rows = p->rows / tiles;
        larger = p->rows % tiles;
    }
    const mha_prefetch *prefetch = p->prefetch;
    V(progress) at = {.a = p->a, .addend = p->addend, .c = p->c, .ahead = p->a};
    if (prefetch && prefetch->rows == 1 && p->depth > 0) {
        at.ahead = prefetch->data;
        at.step = (prefetch->bytes + tiles * p->depth - 1) / (tiles * p->depth);
    } else if (prefetch) {
        at.next = prefetch->data;
        at.left = prefetch->rows;
        at.each = (prefetch->rows + tiles - 1) / tiles;
    }
    if (larger > 0)
        copies[p->vectors - 1][rows](p, &at, larger);
    copies[p->vectors - 1][rows - 1](p, &at, tiles - larger);
}

/* ---- Panels in and out ---- */

/* v[i] = row i of a square, times scale. Rows from `count` on are 0. */
INLINE void V(load_square)(const REAL *rows, size_t row_stride, size_t count, VEC scale, VEC v[])
{
    if (count >= LANES) {
        MHA_UNROLL
        for (size_t i = 0; i < LANES; i++)
            v[i] = V(load)(rows + i * row_stride) * scale;
        return;
    }
    MHA_UNROLL
    for (size_t i = 0; i < LANES; i++) {
        v[i] = V(splat)(0);
        if (i < count)
            v[i] = V(load)(rows + i * row_stride) * scale;
    }
}

/* Whole squares are not inlined: they need more registers than the few numbers of a narrow head. */
NOINLINE void V(pack_squares)(const REAL *rows, size_t row_stride, size_t count, size_t width, VEC scale, REAL *panel,
                              size_t P)
{
    for (size_t d = 0; d < width; d += LANES) {
        VEC v[LANES];
        V(load_square)(rows + d, row_stride, count, scale, v);
        V(transpose)(v);
        MHA_UNROLL
        for (size_t i = 0; i < LANES; i++)
            V(store)(panel + (d + i) * P, v[i]);
    }
}

static void V(pack_panel)(const void *rows_, size_t row_stride, size_t count, size_t width, double scale_, void *panel_,
                          size_t vectors)
{
    const REAL scale = (REAL)scale_;
    const size_t P = vectors * LANES, whole = width / LANES * LANES;
    for (size_t lane = 0; lane < P; lane += LANES) {
        const size_t used = count <= lane ? 0 : count - lane < LANES ? count - lane : LANES;
        const REAL *rows = (const REAL *)rows_ + lane * row_stride;
        REAL *panel = (REAL *)panel_ + lane;
        if (whole > 0)
            V(pack_squares)(rows, row_stride, used, whole, V(splat)(scale), panel, P);
        for (size_t d = whole; d < width; d++) {
            const REAL *from = rows + d;
            REAL *to = panel + d * P;
            V(store)(to, V(splat)(0));
            for (size_t i = 0; i < used; i++, from += row_stride)
                to[i] = *from * scale;
        }
    }
}

NOINLINE void V(unpack_squares)(const REAL *panel, size_t P, VEC factor, size_t count, size_t width, REAL *rows,
                                size_t row_stride)
{
    for (size_t d = 0; d < width; d += LANES) {
        VEC v[LANES];
        V(load_square)(panel + d * P, P, LANES, factor, v);
        V(transpose)(v);
        MHA_UNROLL
        for (size_t i = 0; i < LANES; i++)
            if (i < count)
                V(store)(rows + i * row_stride + d, v[i]);
    }
}

static void V(unpack_panel)(const void *panel_, size_t vectors, const void *factor_, size_t count, size_t width,
                            void *rows_, size_t row_stride)
{
    const size_t P = vectors * LANES, whole = width / LANES * LANES;
    for (size_t lane = 0; lane < count; lane += LANES) {
        const size_t used = count - lane < LANES ? count - lane : LANES;
        const REAL *panel = (const REAL *)panel_ + lane, *factor = (const REAL *)factor_ + lane;
        REAL *rows = (REAL *)rows_ + lane * row_stride;
        if (whole > 0)
            V(unpack_squares)(panel, P, V(load)(factor), used, whole, rows, row_stride);
        for (size_t d = whole; d < width; d++) {
            const REAL *from = panel + d * P;
            REAL *to = rows + d;
            for (size_t i = 0; i < used; i++, to += row_stride)
                *to = from[i] * factor[i];
        }
    }
}

/* ---- Masks ---- */

/* One number of a mask, as it is added to a score. */
INLINE REAL V(mask_value)(mha_mask_kind kind, const char *at)
{
    float f;
    double d;
    if (kind == MHA_MASK_FLOAT32) {
        memcpy(&f, at, sizeof f);
        return (REAL)f;
    }
    memcpy(&d, at, sizeof d);
    return (REAL)d;
}

/* values[i] = what one row of a mask of numbers adds to the score of key i of the block. Zeros follow up to a whole
 * vector. `kind` is a constant in every copy. */
INLINE void V(read_row_of)(const mha_mask_kind kind, const char *row, ptrdiff_t stride, const mha_mask_block *block,
                           size_t keys, REAL *values)
{
    size_t i = 0;
    if (block->index) {
        for (; i < keys; i++)
            values[i] = V(mask_value)(kind, row + (ptrdiff_t)block->index[i] * stride);
    } else {
        row += (ptrdiff_t)block->first_key * stride;
        if (kind == V(own_kind) && stride == (ptrdiff_t)sizeof(REAL))
            memcpy(values, row, (i = keys) * sizeof(REAL));
        for (; i < keys; i++)
            values[i] = V(mask_value)(kind, row + (ptrdiff_t)i * stride);
    }
    for (; i % LANES > 0; i++)
        values[i] = 0;
}

static void V(read_row)(mha_mask_kind kind, const char *row, ptrdiff_t stride, const mha_mask_block *block,
                        size_t keys, REAL *values)
{
    if (kind == MHA_MASK_FLOAT32)
        V(read_row_of)(MHA_MASK_FLOAT32, row, stride, block, keys, values);
    else
        V(read_row_of)(MHA_MASK_FLOAT64, row, stride, block, keys, values);
}

/* bias = what the masks of numbers add. Returns whether that is anything but 0. */
static bool V(read_numbers)(REAL *bias, size_t keys, size_t P, size_t count, const mha_mask_block *block)
{
    REAL of_keys[MHA_BLOCK_KEYS] = {0}, rows[LANES][MHA_BLOCK_KEYS];
    const REAL *row[LANES];
    const bool has_attn = is_of_numbers(block->attn_kind);
    /* whole vectors can be read in place */
    const bool is_ready = block->attn_kind == V(own_kind) && block->attn_s == (ptrdiff_t)sizeof(REAL) &&
                          !block->index && keys % LANES == 0;
    const VEC zero = V(splat)(0);
    VEC not_zero = zero;
    if (block->padding_kind)
        V(read_row)(block->padding_kind, block->padding, block->padding_s, block, keys, of_keys);
    for (size_t first = 0; first < P; first += LANES) {
        for (size_t i = 0; i < LANES && has_attn; i++) {
            const size_t lane = first + i < count ? first + i : count - 1;
            row[i] = is_ready ? (const REAL *)(const void *)block->attn[lane] + block->first_key : rows[i];
            if (!is_ready)
                V(read_row)(block->attn_kind, block->attn[lane], block->attn_s, block, keys, rows[i]);
        }
        for (size_t k = 0; k < keys; k += LANES) {
            VEC v[LANES];
            MHA_UNROLL
            for (size_t i = 0; i < LANES; i++)
                v[i] = has_attn ? V(load)(row[i] + k) : V(splat)(0);
            V(transpose)(v);
            for (size_t i = 0; i < LANES && k + i < keys; i++) {
                const VEC x = v[i] + V(splat)(of_keys[k + i]);
                V(store)(bias + (k + i) * P + first, x);
                not_zero = V(either)(not_zero, x);
            }
        }
    }
    return memcmp(&not_zero, &zero, sizeof zero) != 0;
}

/* Whether all lanes of a key are -inf. */
static bool V(is_hidden)(const REAL *bias, size_t P)
{
    const VEC zero = V(splat)(0), infinite = V(splat)(-(REAL)INFINITY);
    VEC not_hidden = zero;
    for (size_t lane = 0; lane < P; lane += LANES)
        not_hidden = V(either)(not_hidden, V(unlike)(V(load)(bias + lane), infinite));
    return memcmp(&not_hidden, &zero, sizeof zero) == 0;
}

/* Masks that hide keys are read as 64 bits per query, one for each key of the block. A vector takes the bits of its
 * lanes together. */
static mha_visible V(read_masks)(void *bias_, size_t keys, size_t vectors, size_t count, const mha_mask_block *block)
{
    enum { WORD_BITS = 8 * sizeof(REAL), WORDS = MHA_BLOCK_KEYS / WORD_BITS };
    REAL *bias = bias_, hidden[WORDS][MHA_MAX_LANES];
    const size_t P = vectors * LANES;
    const bool has_numbers = is_of_numbers(block->attn_kind) || block->padding_kind;
    uint64_t bits = 0, by_all = UINT64_MAX, by_any = 0;
    for (size_t lane = 0; lane < P; lane++) {
        if (lane < count)
            bits = hidden_keys(block, lane, keys);
        by_all &= bits;
        by_any |= bits;
        for (size_t i = 0; i < WORDS; i++) {
            const V(word) word = (V(word))(bits >> (i * WORD_BITS));
            memcpy(&hidden[i][lane], &word, sizeof word);
        }
    }
    while (keys > 0 && by_all >> (keys - 1) & 1)
        keys--;
    if (keys == 0)
        return (mha_visible){0, false};
    const bool hides = (by_any & first_keys(keys)) != 0;
    const bool is_biased = (has_numbers && V(read_numbers)(bias, keys, P, count, block)) || hides;
    for (size_t k = 0; k < keys && hides; k++)
        for (size_t lane = 0; lane < P; lane += LANES) {
            REAL *at = bias + k * P + lane;
            VEC x = V(hide)(V(load)(hidden[k / WORD_BITS] + lane), k % WORD_BITS);
            if (has_numbers)
                x = V(load)(at) + x;
            V(store)(at, x);
        }
    while (has_numbers && keys > 0 && V(is_hidden)(bias + (keys - 1) * P, P))
        keys--;
    return (mha_visible){keys, is_biased};
}

/* ---- Softmax ---- */

/* exp(x) for x <= 0, computed as 2^(k / POWERS) (1 + s), where s = exp(r) - 1, k / POWERS ln(2) + r = x and |r| <=
 * ln(2) / (2 POWERS). It is 0 for x < EXP_LOWEST. NaN stays NaN.
 *
 * The error is less than 1.125 ulp for float (1.122 over all of them) and 0.75 ulp for double, plus the effect of
 * rounding ln(2), which grows with |x|: at most |x| / 20 ulp for float and |x| / 3 ulp for double. Subtracting the
 * maximum has already introduced a larger error, up to |x|.
 *
 * Adding ROUND leaves k, biased as exponents are, in the low bits of the sum. The eight powers of float are looked up
 * by units that are idle, unlike those that multiply and add. AVX2 cannot look up eight powers of double at once. s is
 * r + r^2 times a polynomial, which is minimax in the relative error of the result (Remez' algorithm). */
INLINE void V(exp_of_each)(VEC x[], const size_t count)
{
    VEC rounded[EXP_AT_ONCE], r[EXP_AT_ONCE], s[EXP_AT_ONCE];
    const VEC round = V(splat)(V(ROUND));
    MHA_UNROLL
    for (size_t i = 0; i < count; i++)
        rounded[i] = V(fma)(x[i], V(splat)(V(POWERS) * V(LOG2_E)), round);
    MHA_UNROLL
    for (size_t i = 0; i < count; i++)
        r[i] = V(fma)(round - rounded[i], V(splat)(V(LN_2) / V(POWERS)), x[i]);
    MHA_UNROLL
    for (size_t i = 0; i < count; i++)
        s[i] = V(splat)(V(exp_coefficients)[0]);
    MHA_UNROLL
    for (size_t c = 1; c < sizeof V(exp_coefficients) / sizeof(REAL); c++) {
        MHA_UNROLL
        for (size_t i = 0; i < count; i++)
            s[i] = V(fma)(s[i], r[i], V(splat)(V(exp_coefficients)[c]));
    }
    MHA_UNROLL
    for (size_t i = 0; i < count; i++)
        s[i] = V(fma)(s[i], r[i] * r[i], r[i]);
    MHA_UNROLL
    for (size_t i = 0; i < count; i++) {
        const VEC power = V(power)(rounded[i]);
        x[i] = V(zero_below)(V(fma)(power, s[i], power), x[i], V(splat)(V(EXP_LOWEST)));
    }
}

INLINE VEC V(exp)(VEC x)
{
    V(exp_of_each)(&x, 1);
    return x;
}

static void V(softmax_begin)(void *maximum_, void *sum_, size_t vectors)
{
    REAL *maximum = maximum_, *sum = sum_;
    for (size_t lane = 0; lane < vectors * LANES; lane += LANES) {
        /* not -inf: a row that sees no key must not compute -inf - -inf */
        V(store)(maximum + lane, V(splat)(V(LOWEST)));
        V(store)(sum + lane, V(splat)(0));
    }
}

/* p[i] = exp(score of key i - maximum) for `count` keys, at most EXP_VECTORS. */
INLINE void V(exp_of_scores)(const REAL *scores, size_t P, VEC maximum, VEC p[], const size_t count)
{
    MHA_UNROLL
    for (size_t i = 0; i < count; i++)
        p[i] = V(load)(scores + i * P) - maximum;
    MHA_UNROLL
    for (size_t i = 0; i < count; i += EXP_AT_ONCE)
        V(exp_of_each)(p + i, count - i < EXP_AT_ONCE ? count - i : EXP_AT_ONCE);
}

/* The same, stored, and each added to a sum of its own. */
INLINE void V(sum_up)(const REAL *scores, size_t P, VEC maximum, REAL *exps, VEC sums[EXP_VECTORS], const size_t count)
{
    VEC p[EXP_VECTORS];
    V(exp_of_scores)(scores, P, maximum, p, count);
    MHA_UNROLL
    for (size_t i = 0; i < count; i++) {
        V(store)(exps + i * P, p[i]);
        sums[i] = sums[i] + p[i];
    }
}

/* The same in place, divided by the sum. */
INLINE void V(probabilities_of)(REAL *scores, size_t P, VEC maximum, VEC sum, const size_t count)
{
    VEC p[EXP_VECTORS];
    V(exp_of_scores)(scores, P, maximum, p, count);
    MHA_UNROLL
    for (size_t i = 0; i < count; i++)
        V(store)(scores + i * P, p[i] / sum);
}

/* The largest of the keys' scores and of `so_far`. There are two chains, which wait less for each other. */
INLINE VEC V(largest)(const REAL *scores, size_t keys, size_t P, VEC so_far)
{
    VEC even = so_far, odd = so_far;
    size_t i = 0;
    for (; i + 4 <= keys; i += 4) {
        even = V(max)(even, V(max)(V(load)(scores + i * P), V(load)(scores + (i + 2) * P)));
        odd = V(max)(odd, V(max)(V(load)(scores + (i + 1) * P), V(load)(scores + (i + 3) * P)));
    }
    for (; i < keys; i++)
        even = V(max)(even, V(load)(scores + i * P));
    return V(max)(even, odd);
}

static void V(softmax_step)(const void *scores_, size_t keys, size_t vectors, void *exps_, void *maximum_, void *sum_,
                            void *factor_)
{
    const size_t P = vectors * LANES;
    for (size_t lane = 0; lane < P; lane += LANES) {
        const REAL *scores = (const REAL *)scores_ + lane;
        REAL *exps = (REAL *)exps_ + lane, *maximum = (REAL *)maximum_ + lane;
        REAL *sum = (REAL *)sum_ + lane, *factor = (REAL *)factor_ + lane;
        const VEC old = V(load)(maximum);
        const VEC new = V(largest)(scores, keys, P, old);
        /* four short sums have a smaller error than a long one */
        VEC sums[EXP_VECTORS] = {V(splat)(0), V(splat)(0), V(splat)(0), V(splat)(0)};
        size_t i = 0;
        for (; i + EXP_VECTORS <= keys; i += EXP_VECTORS)
            V(sum_up)(scores + i * P, P, new, exps + i * P, sums, EXP_VECTORS);
        MHA_UNROLL
        for (size_t rest = 1; rest < EXP_VECTORS; rest++)
            if (rest == keys - i)
                V(sum_up)(scores + i * P, P, new, exps + i * P, sums, rest);
        const VEC block_sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        const VEC rescale = V(exp)(old - new);
        V(store)(sum, V(fma)(V(load)(sum), rescale, block_sum));
        V(store)(maximum, new);
        V(store)(factor, rescale);
    }
}

static void V(softmax_merge)(void *sums_, void *maximum_, void *sum_, const void *sums_2_, const void *maximum_2_,
                             const void *sum_2_, size_t width, size_t vectors)
{
    const size_t P = vectors * LANES;
    for (size_t lane = 0; lane < P; lane += LANES) {
        REAL *sums = (REAL *)sums_ + lane, *maximum = (REAL *)maximum_ + lane, *sum = (REAL *)sum_ + lane;
        const REAL *sums_2 = (const REAL *)sums_2_ + lane;
        const VEC old = V(load)(maximum), old_2 = V(load)((const REAL *)maximum_2_ + lane);
        const VEC new = V(max)(old, old_2);
        const VEC factor = V(exp)(old - new), factor_2 = V(exp)(old_2 - new);
        for (size_t d = 0; d < width; d++)
            V(store)(sums + d * P, V(fma)(V(load)(sums + d * P), factor, V(load)(sums_2 + d * P) * factor_2));
        V(store)(sum, V(fma)(V(load)(sum), factor, V(load)((const REAL *)sum_2_ + lane) * factor_2));
        V(store)(maximum, new);
    }
}

static void V(softmax_probabilities)(void *scores_, size_t keys, size_t vectors, const void *maximum_, const void *sum_)
{
    const size_t P = vectors * LANES;
    for (size_t lane = 0; lane < P; lane += LANES) {
        REAL *scores = (REAL *)scores_ + lane;
        const VEC maximum = V(load)((const REAL *)maximum_ + lane), sum = V(load)((const REAL *)sum_ + lane);
        size_t i = 0;
        for (; i + EXP_VECTORS <= keys; i += EXP_VECTORS)
            V(probabilities_of)(scores + i * P, P, maximum, sum, EXP_VECTORS);
        for (; i < keys; i++)
            V(probabilities_of)(scores + i * P, P, maximum, sum, 1);
    }
}

static void V(softmax_end)(void *sum_, void *inverse_, size_t vectors, mha_empty_row empty_row)
{
    const REAL of_nothing = empty_row == MHA_EMPTY_ROW_NAN ? (REAL)NAN : 1;
    REAL *sum = sum_, *inverse = inverse_;
    for (size_t lane = 0; lane < vectors * LANES; lane++)
        if (sum[lane] == 0)
            sum[lane] = of_nothing;
    for (size_t lane = 0; lane < vectors * LANES; lane += LANES)
        V(store)(inverse + lane, V(splat)(1) / V(load)(sum + lane));
}

static void V(accumulate)(void *total_, const void *x_, size_t n)
{
    REAL *total = total_;
    const REAL *x = x_;
    for (size_t i = 0; i < n; i += LANES)
        V(store)(total + i, V(load)(total + i) + V(load)(x + i));
}

static void V(fill)(void *x_, size_t n, double value)
{
    REAL *x = x_;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        V(store)(x + i, V(splat)((REAL)value));
    for (; i < n; i++)
        x[i] = (REAL)value;
}

/* A number times 0 is 0 or NaN, and NaN stays in a sum. Four sums wait less for each other. */
static bool V(is_finite)(const void *x_, size_t n)
{
    const REAL *x = x_;
    const VEC zero = V(splat)(0);
    VEC sums[] = {zero, zero, zero, zero};
    size_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        MHA_UNROLL
        for (size_t sum = 0; sum < 4; sum++)
            sums[sum] = V(fma)(V(load)(x + i + sum * LANES), zero, sums[sum]);
    }
    REAL total[V(lanes)], rest = 0;
    V(store)(total, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < n; i++)
        rest += x[i] * 0;
    for (size_t lane = 0; lane < LANES; lane++)
        rest += total[lane];
    return rest == 0;
}

/* ---- Dropout ---- */

static void V(dropout)(void *probabilities_, size_t keys, size_t vectors, size_t count, const mha_dropout_block *block)
{
    REAL *probabilities = probabilities_;
    const size_t P = vectors * LANES;
    const REAL kept = (REAL)block->scale;
    for (size_t lane = 0; lane < count; lane++) {
        mha_philox_block random = {{0}};
        size_t held = SIZE_MAX; /* the group of four keys of `random` */
        for (size_t i = 0; i < keys; i++) {
            const size_t s = block->index ? block->index[i] : block->first_key + i;
            if (s / 4 != held) {
                held = s / 4;
                random = mha_philox(block->key, block->n, block->h, block->first_query + lane, held);
            }
            probabilities[i * P + lane] *= random.word[s % 4] < block->threshold ? kept : 0;
        }
    }
}

#undef LANES
#undef VEC
#undef DTYPE
#undef REAL
