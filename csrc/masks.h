/* SPDX-License-Identifier: Apache-2.0
 *
 * masks.h - what the masks leave: the live keys of each batch item, and what one block of scores needs of the rest.
 *
 * A key that key_padding_mask removes for certain (a True, or a float -inf) does not exist for the rest of the core:
 * it is neither projected nor scored. What remains keeps its order and its number, which the other masks refer to.
 * After the live keys come the extra ones (bias_k, then zero attention), in a block of their own: no mask concerns them.
 */
#ifndef MHA_MASKS_H
#define MHA_MASKS_H

#include "kernels/kernels.h"
#include "sizes.h"
#include "workspace.h"

typedef struct {
    size_t N, S;
    size_t extra;  /* extra keys of every item */
    size_t *start; /* [N + 1]: live keys of the items before n */
    size_t *index; /* [start[N]]: the live keys' numbers; NULL when every key is live */
    bool *is_few;  /* [N]: the item is left to few_queries.c, which projects no keys; false until someone says so */
    size_t *row;   /* [N + 1]: number of the item's first projected key, counted from any number on; filled by
                      mha_number_rows() once is_few is settled */
    char *block;   /* owns all of the above; NULL: these are some items of others */
} mha_live_keys;

/* Up to MHA_BLOCK_KEYS keys that are treated together. */
typedef struct {
    bool is_extra;
    size_t row; /* of its first key: among the projected rows of all items, or among the extra ones */
    size_t keys;
    size_t first_key;    /* number of its first key */
    const size_t *index; /* their numbers; NULL: first_key, first_key + 1, ... */
} mha_key_block;

typedef struct {
    mha_mask attn;
    const ptrdiff_t *attn_item; /* [N]: bytes to an item's part of attn, for items out of step; NULL: stride_n */
    mha_mask keys; /* kind NONE once the removed keys are gone and nothing is left to add */
    bool is_causal;
} mha_masks;

/* Finds the live keys and the masks that are left. mha_live_keys_release() frees what it allocated, also on error. */
mha_status mha_read_masks(const mha_call *call, size_t extra, mha_live_keys *live, mha_masks *masks);
void mha_live_keys_release(mha_live_keys *live);

void mha_number_rows(mha_live_keys *live);

/* The same for `count` items from `first` on, without a copy; masks must be without attn_item. */
mha_live_keys mha_live_keys_of(const mha_live_keys *live, size_t first, size_t count);
mha_masks mha_masks_of(const mha_masks *masks, size_t first);

static inline size_t mha_live_count(const mha_live_keys *live, size_t n)
{
    return live->start[n + 1] - live->start[n];
}

/* The number of projected keys. */
static inline size_t mha_live_rows(const mha_live_keys *live)
{
    return live->row[live->N] - live->row[0];
}

/* Blocks of an item, and the i-th of them. */
size_t mha_key_blocks(const mha_live_keys *live, size_t n);
void mha_key_block_at(const mha_live_keys *live, size_t n, size_t i, mha_key_block *block);

/* The number of the i-th key of a block. */
static inline size_t mha_key_number(const mha_key_block *block, size_t i)
{
    return block->index ? block->index[i] : block->first_key + i;
}

/* The first key of an item, from number s on, that is not live; S if there is none. live->index must be there. */
size_t mha_next_removed(const mha_live_keys *live, size_t n, size_t s);

/* The lanes of a panel among those of an item, where lane i is query i / heads, head first_head + i % heads. */
typedef struct {
    size_t first_head, heads;
    size_t first, count; /* lanes */
    size_t vectors;
} mha_lanes;

/* What the lanes see of a block. Where it is biased, bias [keys][P] is what the masks add to the scores of the keys in
 * view; else nothing need be added, and bias may have been written to. */
mha_view mha_look(const mha_kernels *kernels, const mha_masks *masks, size_t n, const mha_lanes *lanes,
                  const mha_key_block *block, void *bias);

#endif
