/* SPDX-License-Identifier: Apache-2.0
 *
 * batch.h - the items that a pass is about, and their live keys.
 *
 * A key that key_padding_mask hides (True, or a float of -inf) does not exist for the rest of the core. It is neither
 * projected nor scored. The live keys keep their order. They also keep their indices, which the other masks refer to.
 * The extra keys (bias_k, then zero attention) come after them, in a block of their own.
 *
 * An item has an index in the call, and a place in the batch. A shorter list of indices is a smaller batch: a chunk of
 * items, or those that few_queries.c computes.
 */
#ifndef MHA_BATCH_H
#define MHA_BATCH_H

#include "kernels/kernels.h"
#include "mha.h"

typedef struct {
    size_t count;
    const ptrdiff_t *items; /* [count]: their indices, ascending */
    size_t S;
    size_t extra;        /* extra keys of every item */
    const size_t *start; /* [N + 1]: by an item's index, the live keys of all items before it */
    const size_t *index; /* [start[N]]: the indices of the live keys; NULL: every key is live */
} mha_batch;

/* All items of a call, and room to pick some of them. */
typedef struct {
    mha_batch all;
    bool padding_adds; /* whether padding adds a number other than 0 to the score of a live key */
    bool *is_picked;   /* [N]; false at first */
    ptrdiff_t *picked; /* [N]: the items of a batch that was picked */
    char *memory;      /* owns the lists */
} mha_items;

/* Lists N items of S keys, and the keys that padding leaves. Of `padding`, stride_h and stride_l are not used. Release
 * items->memory with mha_release(), also after an error. */
mha_status mha_list_items(size_t N, size_t S, const mha_mask *padding, size_t extra, mha_items *items);

/* The items that are picked, or all others. The batch is valid until the next one is picked. */
mha_batch mha_pick_items(const mha_items *items, bool is_picked);

static inline size_t mha_item_index(const mha_batch *batch, size_t i)
{
    return (size_t)batch->items[i];
}

/* The number of live keys of the item at place i. */
static inline size_t mha_live_keys(const mha_batch *batch, size_t i)
{
    const size_t *start = batch->start + batch->items[i];
    return start[1] - start[0];
}

/* The indices of its live keys. NULL: 0, 1, 2, ... */
static inline const size_t *mha_live_indices(const mha_batch *batch, size_t i)
{
    return batch->index ? batch->index + batch->start[batch->items[i]] : NULL;
}

/* The number of live keys of all items of a batch. */
size_t mha_all_live_keys(const mha_batch *batch);

/* The first key from index s on that is not live. S if there is none. batch->index must not be NULL. */
size_t mha_next_removed(const mha_batch *batch, size_t i, size_t s);

/* At most MHA_BLOCK_KEYS keys that are computed together. */
typedef struct {
    bool is_extra;
    size_t first; /* how many of the item's live keys, or of the extra keys, come before */
    size_t keys;
    size_t first_key;    /* index of the first key */
    const size_t *index; /* indices of the keys; NULL: first_key, first_key + 1, ... */
} mha_key_block;

/* The number of key blocks of an item. */
size_t mha_key_blocks(const mha_batch *batch, size_t i);

/* Describes key block b of an item. */
void mha_key_block_at(const mha_batch *batch, size_t i, size_t b, mha_key_block *block);

/* The index of key k of a block. */
static inline size_t mha_key_index(const mha_key_block *block, size_t k)
{
    return block->index ? block->index[k] : block->first_key + k;
}

/* The mask of one query, at key 0. */
static inline const char *mha_mask_at(const mha_mask *mask, size_t n, size_t h, size_t l)
{
    return (const char *)mask->data + (ptrdiff_t)n * mask->stride_n + (ptrdiff_t)h * mask->stride_h +
           (ptrdiff_t)l * mask->stride_l;
}

#endif
