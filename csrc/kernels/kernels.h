/* SPDX-License-Identifier: Apache-2.0
 *
 * kernels.h - everything that differs from one instruction set to another: a table of sizes and functions.
 *
 * Each instruction set exports one table per dtype, made from the one source kernels.inc.h. All arithmetic on real
 * numbers happens behind this table, so that the rest of the core is the same for float32 and float64.
 *
 * Words: a *vector* holds `lanes` numbers; a *panel* is a matrix stored as [k][P] whose P = vectors * lanes columns
 * are computed side by side. Every operation here is *vertical*: no lane ever looks at another. So the bits of a
 * result do not depend on the lane or the panel that computed it, nor on how wide either is.
 *
 * No pointer needs more alignment than its type. Panels are padded to whole vectors; what stands in unused lanes is
 * computed like the rest and never read. Strides and sizes count numbers, not bytes, unless a name says so.
 */
#ifndef MHA_KERNELS_H
#define MHA_KERNELS_H

#include "../mha.h"

/* An FMA chain covers at most this many input features, an attention block this many keys. They are constants of the
 * project, the same on every instruction set: changing them changes the bits of results. */
enum { MHA_CHAIN = 64, MHA_BLOCK_KEYS = 64 };

/* The most numbers in a panel, and in a vector, on any instruction set. */
enum { MHA_MOST_LANES = 48, MHA_MAX_VECTOR_LANES = 16 };

/* Before a loop over the vectors of an array, as many as a constant says: unless it is unrolled, gcc keeps them in memory
 * instead of registers. */
#ifdef __clang__
#define MHA_UNROLL _Pragma("unroll")
#else
#define MHA_UNROLL _Pragma("GCC unroll 64")
#endif

/* Memory that is about to be read: rows of so many bytes, or none. One row is fetched little by little all through the
 * product, so that even a product of few rows, which waits for memory only, never asks for much at once, or not at all
 * where hardware does as well; of several rows some are fetched before each tile. */
typedef struct {
    const char *data;
    size_t rows, bytes;
    ptrdiff_t stride; /* bytes between rows */
} mha_next;

/* C[rows][P] = chain                       when addend is NULL,
 *            = addend + chain              when factor is NULL,
 *            = addend * factor + chain     (fused) otherwise, where
 * chain[r][lane] = sum over k < depth of a[r * a_row + k * a_k] * b[k * b_k + lane], one FMA after another from zero.
 *
 * addend is [rows][P] with stride addend_row (0 repeats one row, as for a bias) and may be c itself; factor is [P].
 * Nothing else overlaps. P = vectors * lanes with 1 <= vectors <= mha_kernels.vectors; any rows, any depth.
 * Meanwhile `next`, what the caller is going to read after this, is fetched into the cache; NULL: nothing.
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
    const void *addend;
    size_t addend_row;
    const void *factor;
    void *c;
    size_t c_row;
    const mha_next *next;
} mha_product;

/* The part of the masks that one block of scores needs: keys of the block by lanes of the panel. */
typedef struct {
    const char *attn[MHA_MOST_LANES]; /* of each lane's query, at key 0 of the whole item; kind NONE: not read */
    size_t query[MHA_MOST_LANES];     /* the lane's query by its number; read where is_causal */
    const char *keys;                 /* key_padding_mask at key 0: numbers; keys it hides are gone */
    mha_mask_kind attn_kind, keys_kind;
    ptrdiff_t attn_s, keys_s; /* strides in bytes */
    const size_t *index; /* the block's keys by their number in the item; NULL: first_key, first_key + 1, ... */
    size_t first_key;
    bool is_causal;
} mha_mask_block;

/* What the lanes of a panel see of a block. */
typedef struct {
    size_t keys;    /* the first so many: no lane sees one after them; 0: none is seen */
    bool is_biased; /* the masks add something to their scores */
} mha_view;

/* Where a block of attention weights stands in the random stream: what happens to the weight of (n, h, l, s) depends
 * on these four and on the key alone. */
typedef struct {
    const uint32_t *key;  /* of mha_philox(): two words made from the seed and the number of the call */
    uint64_t threshold;   /* a weight stays when its random word is below: (1 - p) * 2^32 */
    double scale;         /* 1 / (1 - p), for those that stay */
    size_t n, h, first_query;
    const size_t *index; /* as in mha_mask_block */
    size_t first_key;
} mha_dropout_block;

typedef struct mha_kernels {
    const char *name; /* of the instruction set: what MHA_C_CPU may say */
    mha_dtype dtype;
    size_t item;    /* bytes of a number */
    size_t lanes;   /* numbers in a vector */
    size_t vectors; /* the most vectors of a panel */

    void (*product)(const mha_product *product);

    /* panel[d][lane] = rows[lane * row_stride + d] * scale for d < width; lanes from `count` up to P become 0. */
    void (*pack_panel)(const void *rows, size_t row_stride, size_t count, size_t width, double scale, void *panel,
                       size_t vectors);

    /* rows[lane * row_stride + d] = panel[d][lane] * factor[lane], for lane < count and d < width. */
    void (*unpack_panel)(const void *panel, size_t vectors, const void *factor, size_t count, size_t width,
                         void *rows, size_t row_stride);

    /* bias[key][lane] = what the masks add to a score (torch's order: they are added to each other first), -inf where
     * they hide the key, for the keys in view; not written where the view has no bias, which is where all add 0. Lanes
     * from `count` on are like the last one. */
    mha_view (*read_masks)(void *bias, size_t keys, size_t vectors, size_t count, const mha_mask_block *masks);

    /* One step of the online softmax: exps[keys][P] = exp(score - maximum), in the place of the scores or elsewhere,
     * with the running maximum [P] and sum [P] brought up to date and factor [P] = exp(old maximum - new maximum).
     * softmax_begin() sets maximum and sum for no keys at all. */
    void (*softmax_begin)(void *maximum, void *sum, size_t vectors);
    void (*softmax_step)(const void *scores, size_t keys, size_t vectors, void *exps, void *maximum, void *sum,
                         void *factor);

    /* Joins what two runs over different keys left: sums [width][P] of values, maximum and sum [P]. The first three
     * take in the other three. */
    void (*softmax_merge)(void *sums, void *maximum, void *sum, const void *sums_2, const void *maximum_2,
                          const void *sum_2, size_t width, size_t vectors);

    /* What to divide by, once all keys are through. Where sum is 0 (no key was visible: one that is adds at least the
     * exp(0) of the maximum) it becomes NaN or 1, as `empty_row` says; inverse [P] = 1 / sum. */
    void (*softmax_end)(void *sum, void *inverse, size_t vectors, mha_empty_row empty_row);

    /* scores[key][lane] becomes exp(score - maximum[lane]) / sum[lane]: the attention weights themselves, once
     * maximum and sum are final. */
    void (*softmax_weights)(void *scores, size_t keys, size_t vectors, const void *maximum, const void *sum);

    void (*accumulate)(void *total, const void *x, size_t n); /* total[i] += x[i]; n is a multiple of lanes */
    void (*fill)(void *x, size_t n, double value);
    bool (*is_finite)(const void *x, size_t n); /* no number is NaN or infinite */

    /* weights[key][lane] is multiplied by 0 or by dropout->scale, for lane < count. */
    void (*dropout)(void *weights, size_t keys, size_t vectors, size_t count, const mha_dropout_block *dropout);
} mha_kernels;

/* One table per dtype, indexed by mha_dtype; cpu.c knows which of them this CPU can run. */
extern const mha_kernels mha_kernels_portable[2];
extern const mha_kernels mha_kernels_avx2[2];
extern const mha_kernels mha_kernels_avx512[2];
extern const mha_kernels mha_kernels_neon[2];

#endif
