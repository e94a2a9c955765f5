/* SPDX-License-Identifier: Apache-2.0
 *
 * masks.h - what masks leave: the live keys of each item, and what the lanes of a panel see of a block of keys.
 *
 * A key that key_padding_mask hides (True, or a float of -inf) does not exist for the rest of the core. It is neither
 * projected nor scored. The live keys keep their order. They also keep their numbers, which the other masks refer to.
 * The extra keys (bias_k, then zero attention) come after them, in a block of their own. No mask applies to extra
 * keys.
 */
#ifndef MHA_MASKS_H
#define MHA_MASKS_H

#include "kernels/kernels.h"
#include "mha.h"
#include "workspace.h"

typedef struct {
    size_t N, S;
    size_t extra;  /* number of extra keys of every item */
    size_t *start; /* [N + 1]: the number of live keys of all items before item n */
    size_t *index; /* [start[N]]: the numbers of the live keys; NULL: every key is live */
    bool *is_few;  /* [N]: few_queries.c computes the item, without projecting its keys; false until it is decided */
    /* [N + 1]: the row of the item's first projected key, counted from any number on */
    size_t *first_row;
    char *memory; /* owns the arrays above; NULL: they belong to another mha_live_keys */
} mha_live_keys;

/* At most MHA_BLOCK_KEYS keys that are computed together. */
typedef struct {
    bool is_extra;
    size_t first_row; /* row of the first key, among the projected keys of all items or among the extra keys */
    size_t keys;
    size_t first_key; /* number of the first key */
    const size_t *index; /* numbers of the keys; NULL: first_key, first_key + 1, ... */
} mha_key_block;

/* What decides which keys a query sees, and what is added to their scores. */
typedef struct {
    mha_mask attn;
    const ptrdiff_t *attn_item; /* [N]: bytes from attn.data to the mask of an item; NULL: n * stride_n */
    mha_mask padding; /* kind NONE if no live key has a number other than 0 */
    bool is_causal;
} mha_rules;

/* Finds the live keys and the rules that remain. mha_live_keys_release() frees the memory, also after an error. */
mha_status mha_read_masks(const mha_call *call, size_t extra, mha_live_keys *live, mha_rules *rules);
void mha_live_keys_release(mha_live_keys *live);

/* Fills first_row, once is_few is decided. */
void mha_number_rows(mha_live_keys *live);

/* Live keys and rules of `count` items from item `first` on. They share the memory. The rules must not have
 * attn_item. */
mha_live_keys mha_live_keys_of(const mha_live_keys *live, size_t first, size_t count);
mha_rules mha_rules_of(const mha_rules *rules, size_t first);

static inline size_t mha_live_count(const mha_live_keys *live, size_t n)
{
    return live->start[n + 1] - live->start[n];
}

/* The number of projected keys of all items. */
static inline size_t mha_live_rows(const mha_live_keys *live)
{
    return live->first_row[live->N] - live->first_row[0];
}

/* The number of key blocks of an item. */
size_t mha_key_blocks(const mha_live_keys *live, size_t n);

/* Describes key block i of an item. */
void mha_key_block_at(const mha_live_keys *live, size_t n, size_t i, mha_key_block *block);

/* The number of key i of a block. */
static inline size_t mha_key_number(const mha_key_block *block, size_t i)
{
    return block->index ? block->index[i] : block->first_key + i;
}

/* The first key of an item from number s on that is not live. S if there is none. live->index must not be NULL. */
size_t mha_next_removed(const mha_live_keys *live, size_t n, size_t s);

/* The lanes of a panel. Lane i of an item is query i / heads of head first_head + i % heads. */
typedef struct {
    size_t first_head, heads;
    size_t first, count; /* the lanes of this panel */
    size_t vectors;
} mha_lanes;

/* What the lanes see of a block. If the result is_biased, add bias [keys][P] to the scores of the visible keys.
 * Otherwise add nothing; the contents of bias are then undefined. */
mha_visible mha_apply_rules(const mha_kernels *kernels, const mha_rules *rules, size_t n, const mha_lanes *lanes,
                            const mha_key_block *block, void *bias);

#endif
