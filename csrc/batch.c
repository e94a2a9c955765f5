/* SPDX-License-Identifier: Apache-2.0
 *
 * batch.c - lists the items of a call and the keys that padding leaves, and cuts these into blocks.
 *
 * Owns: the list of live keys.
 */
#include "batch.h"

#include "workspace.h"

/* Lists the live keys of item n and returns their number. Sets *adds if the mask adds a number other than 0 to one of
 * them. */
static size_t list_live_keys(const mha_mask *mask, size_t n, size_t S, size_t *index, bool *adds)
{
    const char *at = mha_mask_at(mask, n, 0, 0);
    size_t live = 0;
    for (size_t s = 0; s < S; s++, at += mask->stride_s) {
        const double value = mha_mask_value(mask->kind, at);
        if (value == -INFINITY)
            continue;
        *adds |= value != 0;
        index[live++] = s;
    }
    return live;
}

mha_status mha_list_items(size_t N, size_t S, const mha_mask *padding, size_t extra, mha_items *items)
{
    mha_plan plan;
    mha_begin_plan(&plan);
    ptrdiff_t *indices;
    size_t *start, *index, keys, total = 0;
    *items = (mha_items){.memory = NULL};
    if (__builtin_mul_overflow(N, S, &keys))
        return MHA_TOO_LARGE; /* so mha_walk_rows() cannot overflow */
    mha_place(&plan, &indices, N, 1, sizeof *indices);
    mha_place(&plan, &items->picked, N, 1, sizeof *items->picked);
    mha_place(&plan, &items->is_picked, N, 1, sizeof *items->is_picked);
    mha_place(&plan, &start, N + 1, 1, sizeof *start);
    mha_place(&plan, &index, padding->kind ? N : 0, S, sizeof *index);
    const mha_status status = mha_allocate(&plan, &items->memory);
    if (status != MHA_OK)
        return status;
    for (size_t n = 0; n < N; n++) {
        indices[n] = (ptrdiff_t)n;
        items->is_picked[n] = false;
        start[n] = total;
        total += padding->kind ? list_live_keys(padding, n, S, index + total, &items->padding_adds) : S;
    }
    start[N] = total;
    items->all = (mha_batch){.count = N, .items = indices, .S = S, .extra = extra, .start = start,
                             .index = total < keys ? index : NULL};
    return MHA_OK;
}

mha_batch mha_pick_items(const mha_items *items, bool is_picked)
{
    mha_batch batch = items->all;
    batch.items = items->picked;
    batch.count = 0;
    for (size_t n = 0; n < items->all.count; n++)
        if (items->is_picked[n] == is_picked)
            items->picked[batch.count++] = (ptrdiff_t)n;
    return batch;
}

size_t mha_all_live_keys(const mha_batch *batch)
{
    size_t keys = 0;
    if (!batch->index)
        return batch->count * batch->S;
    for (size_t i = 0; i < batch->count; i++)
        keys += mha_live_keys(batch, i);
    return keys;
}

static size_t blocks_of_live_keys(const mha_batch *batch, size_t i)
{
    return mha_divide_up(mha_live_keys(batch, i), MHA_BLOCK_KEYS);
}

size_t mha_key_blocks(const mha_batch *batch, size_t i)
{
    return blocks_of_live_keys(batch, i) + (batch->extra > 0);
}

void mha_key_block_at(const mha_batch *batch, size_t i, size_t b, mha_key_block *block)
{
    block->is_extra = b == blocks_of_live_keys(batch, i);
    block->index = NULL;
    if (block->is_extra) {
        block->first = 0;
        block->keys = batch->extra;
        block->first_key = batch->S;
        return;
    }
    const size_t before = b * MHA_BLOCK_KEYS, keys = mha_smaller(mha_live_keys(batch, i) - before, MHA_BLOCK_KEYS);
    block->first = block->first_key = before;
    block->keys = keys;
    if (batch->index) {
        const size_t *index = mha_live_indices(batch, i) + before;
        block->first_key = index[0];
        /* usually padding is at one end, and the live keys are consecutive */
        if (index[keys - 1] - index[0] != keys - 1)
            block->index = index;
    }
}

size_t mha_next_removed(const mha_batch *batch, size_t i, size_t s)
{
    /* The number of live keys before s, by bisection. */
    const size_t *index = mha_live_indices(batch, i), live_keys = mha_live_keys(batch, i);
    size_t low = 0, high = live_keys;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (index[middle] < s)
            low = middle + 1;
        else
            high = middle;
    }
    while (low < live_keys && index[low] == s) {
        low++;
        s++;
    }
    return s;
}
