/* SPDX-License-Identifier: Apache-2.0
 *
 * kernels.h - everything that differs between instruction sets: a table of sizes and functions.
 *
 * Each instruction set exports a table for float32 and one for float64. Both are made from one source, kernels.inc.h.
 * All arithmetic on real numbers is behind these tables, so that the rest of the core is the same for both. Halves are
 * widened to float32, unless products are of bfloat16.
 *
 * A *vector* holds `lanes` numbers. A *panel* is a matrix [k][P] whose P = vectors * lanes columns are computed side by
 * side. Every operation on a panel is *vertical*: no lane looks at another. So the bits of a result do not depend on
 * the lane or the panel that computed it, nor on the width of either. normalize() alone adds the numbers of a row, in
 * an order that does not depend on the width of a vector.
 *
 * No pointer needs more alignment than its type. Panels are padded to whole vectors. Unused lanes are computed like the
 * others and never read. Strides and sizes count numbers unless a name says bytes.
 */
#ifndef MHA_KERNELS_H
#define MHA_KERNELS_H

#include <math.h>
#include <string.h>

#include "../base.h"

/* The most input features in a chain of fused multiply-adds, and the most keys in a block of attention. They are the
 * same on every instruction set, because the bits of results depend on them. Chains start at zero and are added in
 * order, which is more accurate than one long chain. */
enum { MHA_CHAIN = 64, MHA_BLOCK_KEYS = 64 };

/* The most numbers in a panel, and in a vector, on any instruction set. kernels.inc.h checks them. */
enum { MHA_MAX_LANES = 48, MHA_MAX_VECTOR_LANES = 16 };

/* Memory that will be read soon: some rows, or none. Several rows (keys, values) are prefetched a few at a time, before
 * each tile. A single row (packed weights) is prefetched evenly over the whole product: in every step of a tile, so
 * that a product of few rows never has many requests outstanding, or before each of many tiles. A product of one to
 * three rows may prefetch its own panel in its place, or nothing. */
typedef struct {
    const char *data;
    size_t rows, bytes; /* bytes: of a row */
    ptrdiff_t stride_bytes;
} mha_prefetch;

/* A product of one or two rows goes through several panels at once. One panel has too few sums for a row to keep the
 * multiply-add units busy, and caches fetch faster from several places than from one. */
static inline size_t mha_panels_at_once(size_t rows)
{
    return rows == 1 ? 4 : rows == 2 ? 2 : 1;
}

/* C[rows][P] = chain                       if addend is NULL
 *            = addend + chain              if factor is NULL
 *            = addend * factor + chain     (fused) otherwise, where
 *   chain[r][lane] = sum over k < depth of a[r * a_row + k * a_k] * b[k * b_k + lane], one FMA after another from zero.
 *
 * addend is [rows][P] with stride addend_row, and may be c itself. A stride of 0 repeats one row, as for a bias. factor
 * is [P]. Nothing else may overlap. 1 <= vectors <= mha_kernels.vectors. Rows and depth may be 0.
 * `prefetch` is fetched meanwhile; NULL: nothing.
 *
 * If there are n panels, rows of c, addend, factor and b_scale have n * P numbers, panel after panel. n is at most
 * mha_panels_at_once(rows), and panels have at least two vectors.
 *
 *            k ->             b (panel)                    c
 *         +---------+       k +----------+        r +----------+
 *     a r | row r   |    x  | |   P      |   -->  | |    P     |
 *       | +---------+       v +----------+        v +----------+
 */
typedef struct {
    size_t rows, depth, vectors;
    const void *a;
    ptrdiff_t a_row, a_k;
    const void *b;
    size_t b_k;
    size_t more_panels, b_panel_bytes; /* panels after the first one; the distance between two of them */
    mha_dtype b_type; /* of the numbers of b, if they are halves; float32 alone multiplies by halves */
    const float *b_scale; /* [P]; of products of int8 alone */
    const void *addend;
    size_t addend_row;
    const void *factor;
    void *c;
    size_t c_row;
    const mha_prefetch *prefetch;
} mha_product;

/* What a mask of any kind but NONE adds to the score of one key. */
static inline double mha_mask_value(mha_mask_kind kind, const char *at)
{
    float f;
    double d;
    if (kind == MHA_MASK_HIDE)
        return *at ? -INFINITY : 0;
    if (kind == MHA_MASK_SHOW)
        return *at ? 0 : -INFINITY;
    if (kind == MHA_MASK_FLOAT32) {
        memcpy(&f, at, sizeof f);
        return f;
    }
    memcpy(&d, at, sizeof d);
    return d;
}

/* What masks do to one block of scores: keys of the block by lanes of a panel. */
typedef struct {
    /* the mask of each lane's query, at key 0 of the item; not read if attn_kind is NONE */
    const char *attn[MHA_MAX_LANES];
    size_t query[MHA_MAX_LANES]; /* the index of each lane's query; read if is_causal */
    const char *padding;                 /* the float key_padding_mask, at key 0; keys that it hides are not live */
    mha_mask_kind attn_kind, padding_kind;
    ptrdiff_t attn_s_bytes, padding_s_bytes; /* from key to key */
    const size_t *index; /* indices of the block's keys; NULL: first_key, first_key + 1, ... */
    size_t first_key;
    bool is_causal;
} mha_mask_block;

/* What the lanes of a panel see of a block. */
typedef struct {
    size_t keys;    /* the first `keys` keys of the block; no lane sees the others */
    bool is_biased; /* masks add something to the scores of these keys */
} mha_visible;

/* Where a block of probabilities is in the random stream. What happens to probability (n, h, l, s) depends on these
 * four indices and the key alone. */
typedef struct {
    const uint32_t *key;  /* of mha_philox(); made from the seed and the number of the call */
    uint64_t threshold; /* (1 - p) * 2^32; a probability is kept if its random word is less */
    double scale;       /* 1 / (1 - p), the factor of probabilities that are kept */
    size_t n, h, first_query;
    const size_t *index; /* as in mha_mask_block */
    size_t first_key;
} mha_dropout_block;

/* Attention of one head, in which every query sees every key. Queries, keys, D and Dv are at most MHA_HANDFUL. */
enum { MHA_HANDFUL = 16 };
typedef struct {
    size_t queries, keys, D, Dv;
    const void *q, *k, *v; /* rows of adjacent numbers */
    void *context;
    ptrdiff_t q_row, k_row, v_row, context_row; /* distances between rows */
    double scale;
    mha_empty_row empty_row;
} mha_handful;

/* Some rows, each of which is normalized by itself, over its `width` numbers:
 *
 *   y = (x - mean) / sqrt(variance + eps) * weight + bias     variance: the mean of (x - mean)^2
 *   y = x / sqrt(mean of x^2 + eps) * weight + bias           if is_rms
 *
 * y may be x, with the same distance between rows. Nothing else may overlap. Rows and width may be 0. */
typedef struct {
    size_t rows, width;
    const void *x;
    ptrdiff_t x_row; /* the distance between rows */
    void *y;
    ptrdiff_t y_row;
    mha_norm norm;
} mha_norm_rows;

typedef struct mha_kernels {
    const char *name; /* of the instruction set, as in MHA_C_CPU */
    mha_dtype dtype;
    size_t size;    /* bytes of a number */
    size_t lanes;   /* numbers in a vector */
    size_t vectors; /* in a panel, at most */

    void (*product)(const mha_product *product);

    /* panel[d][lane] = rows[lane * row_stride + d] * scale for d < width; lanes from `count` up to P become 0. */
    void (*pack_panel)(const void *rows, size_t row_stride, size_t count, size_t width, double scale, void *panel,
                       size_t vectors);

    /* rows[lane * row_stride + d] = panel[d][lane] * factor[lane], for lane < count and d < width. */
    void (*unpack_panel)(const void *panel, size_t vectors, const void *factor, size_t count, size_t width,
                         void *rows, size_t row_stride);

    /* bias[key][lane] = what masks add to the score of a visible key: the sum of all masks, -inf if one of them hides
     * the key. Masks are added to each other first, as in torch. If the result is not biased, all would add 0, and the
     * bias is undefined. Lanes from `count` on are like the last one. */
    mha_visible (*read_masks)(void *bias, size_t keys, size_t vectors, size_t count, const mha_mask_block *masks);

    /* scores[i] = value where bias[i] is -inf, for i < n: the scores of hidden keys, whatever they were. */
    void (*hide)(void *scores, const void *bias, size_t n, double value);

    /* sums[lane] += exps[lane] * *number, except where bias[lane] is -inf; NULL: everywhere. */
    void (*add_visible)(void *sums, const void *exps, const void *number, const void *bias, size_t lanes);

    /* One step of the online softmax: exps[key][lane] = exp(score - maximum). The running maximum [P] and sum [P] are
     * updated. factor [P] = exp(old maximum - new maximum). exps may be the same array as scores. softmax_begin() sets
     * maximum and sum before the first key. */
    void (*softmax_begin)(void *maximum, void *sum, size_t vectors);
    void (*softmax_step)(const void *scores, size_t keys, size_t vectors, void *exps, void *maximum, void *sum,
                         void *factor);

    /* Adds the results for some keys to those for other keys: sums [width][P] of values, maximum [P] and sum [P]. The
     * first three arrays are updated. */
    void (*softmax_merge)(void *sums, void *maximum, void *sum, const void *sums_2, const void *maximum_2,
                          const void *sum_2, size_t width, size_t vectors);

    /* inverse [P] = 1 / sum after the last key. If no key was visible, the sum is 0 and becomes NaN or 1, as
     * `empty_row` says. Otherwise it is at least 1, because the key with the maximum adds exp(0). */
    void (*softmax_end)(void *sum, void *inverse, size_t vectors, mha_empty_row empty_row);

    /* scores[key][lane] becomes the probability exp(score - maximum[lane]) / sum[lane]. Maximum and sum must be
     * final. */
    void (*softmax_probabilities)(void *scores, size_t keys, size_t vectors, const void *maximum, const void *sum);

    void (*add)(void *sum, const void *a, const void *b, size_t n); /* sum may be a or b */
    void (*fill)(void *x, size_t n, double value);
    bool (*is_finite)(const void *x, size_t n); /* no number is NaN or infinite */

    /* probabilities[key][lane] is multiplied by 0 or by dropout->scale, for lane < count. */
    void (*dropout)(void *probabilities, size_t keys, size_t vectors, size_t count, const mha_dropout_block *dropout);

    /* context = softmax(scale q k^T) v. The bits are those of calling the functions above in order. */
    void (*attend_handful)(const mha_handful *handful);

    void (*normalize)(const mha_norm_rows *rows);

    /* n halves of this type to float32, and back: rounded to the nearest, ties to even. NaN stays NaN, with its sign
     * and the bits that fit. Both tables of an instruction set have the same functions. */
    void (*widen)(mha_dtype type, const void *halves, size_t n, void *numbers);
    void (*narrow)(mha_dtype type, const void *numbers, size_t n, void *halves);

    /* x[i] = activation(x[i]) * factor[i]; NULL: without a factor. */
    void (*activate)(mha_activation activation, void *x, const void *factor, size_t n);
} mha_kernels;

/* One table for float32 and one for float64, indexed by mha_dtype. cpu.c knows which of them this CPU can run. */
extern const mha_kernels mha_kernels_portable[2];
extern const mha_kernels mha_kernels_avx2[2];
extern const mha_kernels mha_kernels_avx512[2];
extern const mha_kernels mha_kernels_neon[2];

/* ---- Narrow products ----
 *
 * Linear maps of float32 may multiply narrower numbers: rows are narrowed when they are copied for a product, and
 * weights when a layer is loaded.
 *
 *   int8      A row is *quantized* to integers from -127 to 127 with a scale: x is about scale * q. So is each feature
 *             of the weights. Sums of products are exact integers, so that they are equal on every instruction set.
 *   bfloat16  Subnormal numbers become 0, and others are rounded to bfloat16, as vcvtneps2bf16 does. Sums are float32.
 *             Of two neighbours along the depth, the second one is added first, as vdpbf16ps does: two FMAs in this
 *             order give its bits. Only sums below 2^-126 may differ, which the instruction takes for 0.
 *
 * A *group* is `group` numbers of a row or of a feature, side by side, that are multiplied and added in one step. A
 * narrow row is words of 32 bits. A panel is [groups][P], of groups of `group_bytes`. */
typedef enum { MHA_INT8 = 0, MHA_BF16 } mha_narrow_type;

/* Words before the groups of a quantized row: its scale, and what its sums start with. */
enum { MHA_ROW_HEADER = 2 };

/* The most features that are added up as integers. It is the same on every instruction set, as MHA_CHAIN is. */
enum { MHA_INT8_FEATURES = 8192 };

typedef struct {
    size_t group;      /* 1, 2 or 4 */
    size_t group_bytes;
    size_t vectors;    /* in a panel, at most */
    size_t chain;      /* features of one product, at most: MHA_INT8_FEATURES or MHA_CHAIN */
    int weight_offset; /* what panels of int8 hold in addition to each weight */

    /* Words of a narrow row of n numbers. */
    size_t (*row_words)(size_t n);

    /* The bits of the largest |x[i]|. Bits of numbers that are not finite are larger than those of others. NULL: rows
     * have no scale. */
    uint32_t (*largest)(const float *x, size_t n);

    /* Narrows n numbers of a row. Quantized: scale = largest / 127, q = x * (127 / largest), rounded to the nearest,
     * ties to even. A row of zeros, and one with numbers below 2^-120 alone, becomes zeros with the scale 0. If
     * `largest` is not finite, the scale is NaN. */
    void (*take_row)(const float *x, size_t n, uint32_t largest, uint32_t *row);

    /* Narrows a matrix x [depth][width] whose groups are neighbours along the depth, to words [groups][width, rounded
     * up to whole vectors]. Its rows are x_row numbers apart. If that is the distance of the words, too, they may be in
     * the place of x. NULL: rows have a scale. */
    void (*take_columns)(const float *x, size_t x_row, size_t depth, size_t width, uint32_t *columns);

    /* As that of mha_kernels, but depth counts groups, and a_row and a_k count words. The sum of int8 is multiplied by
     * (scale of the row * b_scale) in one FMA that adds the addend or 0. It has no factor, and a_k is 1. b holds groups
     * of `group_bytes` if b_type is MHA_BFLOAT16; otherwise words, as take_columns() makes them. */
    void (*product)(const mha_product *product);
} mha_narrow_kernels;

/* gcc knows AVX512_BF16 from version 10 on. */
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define MHA_KNOWS_AVX512_BF16
#endif

extern const mha_narrow_kernels mha_bf16_portable, mha_int8_portable;
extern const mha_narrow_kernels mha_bf16_avx2, mha_int8_avx2;
extern const mha_narrow_kernels mha_bf16_avx512, mha_int8_avx512;
extern const mha_narrow_kernels mha_bf16_avx512_bf16, mha_int8_avx512_vnni;
extern const mha_narrow_kernels mha_bf16_neon, mha_int8_neon, mha_int8_neon_dotprod;

/* The product of a whole depth, in chains of MHA_CHAIN numbers, and of their groups if `narrow` is not NULL. `product`
 * describes the first chain, except for its depth. */
static inline void mha_multiply_chained(const mha_kernels *kernels, const mha_narrow_kernels *narrow,
                                        mha_product *product, size_t depth)
{
    void (*const multiply)(const mha_product *) = narrow ? narrow->product : kernels->product;
    const size_t chain = narrow ? MHA_CHAIN / narrow->group : MHA_CHAIN;
    const ptrdiff_t a_chain = (ptrdiff_t)(chain * kernels->size) * product->a_k;
    /* Panels of narrow weights are of a half's type, others that are narrow are words, of the size of float32. */
    const bool is_half = mha_is_half(product->b_type);
    const size_t b_size = !is_half ? kernels->size : narrow ? narrow->group_bytes : mha_size_of(product->b_type);
    const size_t b_chain = chain * product->b_k * b_size;
    for (; depth > chain; depth -= chain) {
        product->depth = chain;
        multiply(product);
        product->a = (const char *)product->a + a_chain;
        product->b = (const char *)product->b + b_chain;
        product->addend = product->c;
        product->addend_row = product->c_row;
        product->prefetch = NULL;
    }
    product->depth = depth;
    multiply(product);
}

#endif
