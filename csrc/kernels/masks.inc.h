/* SPDX-License-Identifier: Apache-2.0
 *
 * masks.inc.h - what masks add to a block of scores, and what they hide (kernels.inc.h includes it).
 */

#ifndef MHA_MASKS_INC_H
#define MHA_MASKS_INC_H

#define own_kind_f32 MHA_MASK_FLOAT32 /* of a mask in the kernels' own dtype */
#define own_kind_f64 MHA_MASK_FLOAT64
typedef uint32_t word_f32; /* has as many bits as a number */
typedef uint64_t word_f64;

static bool is_of_numbers(mha_mask_kind kind)
{
    return kind == MHA_MASK_FLOAT32 || kind == MHA_MASK_FLOAT64;
}

_Static_assert(MHA_BLOCK_KEYS == 64, "a bit of 64 for each key of a block");

/* Keys are bits: bit i is key i of the block. This has the first ones. */
static uint64_t first_keys(size_t keys)
{
    return keys < MHA_BLOCK_KEYS ? ((uint64_t)1 << keys) - 1 : UINT64_MAX;
}

static uint64_t hidden_by_mask(const mha_mask_block *block, const char *row, size_t keys)
{
    uint64_t bits = 0;
    size_t i = 0;
    if (!block->index && block->attn_s_bytes == 1) {
        /* One line is read of each row. The lines are far apart, and the hardware foresees none of them. */
        __builtin_prefetch(row + block->first_key + 2 * MHA_BLOCK_KEYS, 0, 2);
        for (; i + 16 <= keys; i += 16)
            bits |= nonzero(row + block->first_key + i) << i;
    }
    for (; i < keys; i++) {
        const size_t key = block->index ? block->index[i] : block->first_key + i;
        bits |= (uint64_t)(row[(ptrdiff_t)key * block->attn_s_bytes] != 0) << i;
    }
    return block->attn_kind == MHA_MASK_HIDE ? bits : ~bits;
}

static uint64_t hidden_by_order(const mha_mask_block *block, size_t query, size_t keys)
{
    size_t seen = keys; /* the indices of keys ascend */
    if (block->index)
        while (seen > 0 && block->index[seen - 1] > query)
            seen--;
    else if (block->first_key + keys > query + 1)
        seen = block->first_key > query ? 0 : query + 1 - block->first_key;
    return ~first_keys(seen);
}

/* The keys that are hidden from the query of a lane. */
static uint64_t hidden_keys(const mha_mask_block *block, size_t lane, size_t keys)
{
    uint64_t bits = 0;
    if (block->attn_kind == MHA_MASK_HIDE || block->attn_kind == MHA_MASK_SHOW)
        bits = hidden_by_mask(block, block->attn[lane], keys);
    return block->is_causal ? bits | hidden_by_order(block, block->query[lane], keys) : bits;
}

#endif

/* values[i] = what one row of a mask of numbers adds to the score of key i of the block. Zeros follow up to a whole
 * vector. `kind` is a constant in every copy. */
INLINE void V(read_row_of)(const mha_mask_kind kind, const char *row, ptrdiff_t stride, const mha_mask_block *block,
                           size_t keys, REAL *values)
{
    size_t i = 0;
    if (block->index) {
        for (; i < keys; i++)
            values[i] = (REAL)mha_mask_value(kind, row + (ptrdiff_t)block->index[i] * stride);
    } else {
        row += (ptrdiff_t)block->first_key * stride;
        if (kind == V(own_kind) && stride == (ptrdiff_t)sizeof(REAL))
            memcpy(values, row, (i = keys) * sizeof(REAL));
        for (; i < keys; i++)
            values[i] = (REAL)mha_mask_value(kind, row + (ptrdiff_t)i * stride);
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

/* The sum of two masks, or -inf where one of them is -inf: it hides the key, even if the other one is inf or NaN. */
INLINE VEC V(add_numbers)(VEC a, VEC b)
{
    const VEC lowest = V(splat)(V(LOWEST));
    b = V(zero_below)(b, a, lowest);
    return V(zero_below)(a, b, lowest) + b;
}

/* bias = what the masks of numbers add. Returns whether that is anything but 0. */
static bool V(read_numbers)(REAL *bias, size_t keys, size_t P, size_t count, const mha_mask_block *block)
{
    REAL of_keys[MHA_BLOCK_KEYS] = {0}, rows[LANES][MHA_BLOCK_KEYS];
    const REAL *row[LANES];
    const bool has_attn = is_of_numbers(block->attn_kind);
    /* whole vectors can be read in place */
    const bool is_ready = block->attn_kind == V(own_kind) && block->attn_s_bytes == (ptrdiff_t)sizeof(REAL) &&
                          !block->index && keys % LANES == 0;
    const VEC zero = V(splat)(0);
    VEC not_zero = zero;
    if (block->padding_kind)
        V(read_row)(block->padding_kind, block->padding, block->padding_s_bytes, block, keys, of_keys);
    for (size_t first = 0; first < P; first += LANES) {
        for (size_t i = 0; i < LANES && has_attn; i++) {
            const size_t lane = first + i < count ? first + i : count - 1;
            row[i] = is_ready ? (const REAL *)(const void *)block->attn[lane] + block->first_key : rows[i];
            if (!is_ready)
                V(read_row)(block->attn_kind, block->attn[lane], block->attn_s_bytes, block, keys, rows[i]);
        }
        for (size_t k = 0; k < keys; k += LANES) {
            VEC v[LANES];
            MHA_UNROLL
            for (size_t i = 0; i < LANES; i++)
                v[i] = has_attn ? V(load)(row[i] + k) : V(splat)(0);
            V(transpose)(v);
            for (size_t i = 0; i < LANES && k + i < keys; i++) {
                VEC x = v[i] + V(splat)(0); /* -0 would look like a bias */
                if (block->padding_kind)
                    x = V(add_numbers)(x, V(splat)(of_keys[k + i]));
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
                x = V(add_numbers)(V(load)(at), x);
            V(store)(at, x);
        }
    while (has_numbers && keys > 0 && V(is_hidden)(bias + (keys - 1) * P, P))
        keys--;
    return (mha_visible){keys, is_biased};
}

static void V(hide_scores)(void *scores_, const void *bias_, size_t n, double value)
{
    REAL *scores = scores_;
    const REAL *bias = bias_;
    for (size_t i = 0; i < n; i++)
        if (bias[i] == -(REAL)INFINITY)
            scores[i] = (REAL)value;
}

static void V(add_visible)(void *sums_, const void *exps_, const void *number, const void *bias_, size_t lanes)
{
    REAL *sums = sums_;
    const REAL *exps = exps_, *bias = bias_;
    for (size_t lane = 0; lane < lanes; lane++)
        if (!bias || bias[lane] != -(REAL)INFINITY)
            sums[lane] += exps[lane] * *(const REAL *)number;
}
