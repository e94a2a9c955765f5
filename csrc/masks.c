/* SPDX-License-Identifier: Apache-2.0
 *
 * masks.c - turns key padding into a list of live keys, and the other rules into what a panel sees of a block.
 *
 * Owns: the list of live keys.
 */
#include "masks.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What a mask of any kind but NONE adds to the score of one key. */
static double mask_value(mha_mask_kind kind, const char *at)
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

static const char *mask_at(const mha_mask *mask, size_t n, size_t h, size_t l)
{
    return (const char *)mask->data + (ptrdiff_t)n * mask->stride_n + (ptrdiff_t)h * mask->stride_h +
           (ptrdiff_t)l * mask->stride_l;
}

static const char *attn_at(const mha_rules *rules, size_t n, size_t h, size_t l)
{
    return rules->attn_item ? mask_at(&rules->attn, 0, h, l) + rules->attn_item[n] : mask_at(&rules->attn, n, h, l);
}

/* Lists the live keys of an item and returns their number. Sets *adds if the mask adds a number other than 0 to one of
 * them. */
static size_t list_live_keys(const mha_mask *mask, size_t n, size_t S, size_t *index, bool *adds)
{
    const char *at = mask_at(mask, n, 0, 0);
    size_t live = 0;
    for (size_t s = 0; s < S; s++, at += mask->stride_s) {
        const double value = mask_value(mask->kind, at);
        if (value == -INFINITY)
            continue;
        *adds |= value != 0;
        index[live++] = s;
    }
    return live;
}

mha_status mha_read_masks(const mha_call *call, size_t extra, mha_live_keys *live, mha_rules *rules)
{
    const mha_mask *padding = &call->key_padding_mask;
    mha_layout layout = {0};
    *live = (mha_live_keys){.N = call->N, .S = call->S, .extra = extra};
    *rules = (mha_rules){.attn = call->attn_mask, .is_causal = call->is_causal};
    const size_t start = mha_reserve(&layout, call->N + 1, 1, sizeof(size_t));
    const size_t row = mha_reserve(&layout, call->N + 1, 1, sizeof(size_t));
    const size_t is_few = mha_reserve(&layout, call->N, 1, sizeof(bool));
    const size_t index = mha_reserve(&layout, padding->kind ? call->N : 0, call->S, sizeof(size_t));
    const mha_status status = mha_allocate(&layout, &live->memory);
    if (status != MHA_OK)
        return status;
    live->start = (size_t *)(void *)(live->memory + start);
    live->first_row = (size_t *)(void *)(live->memory + row);
    live->is_few = memset(live->memory + is_few, false, call->N);
    size_t *list = (size_t *)(void *)(live->memory + index), total = 0;
    bool adds = false;
    for (size_t n = 0; n < call->N; n++) {
        live->start[n] = total;
        total += padding->kind ? list_live_keys(padding, n, call->S, list + total, &adds) : call->S;
    }
    live->start[call->N] = total;
    if (total < call->N * call->S)
        live->index = list;
    if (adds)
        rules->padding = *padding;
    return MHA_OK;
}

void mha_number_rows(mha_live_keys *live)
{
    live->first_row[0] = 0;
    for (size_t n = 0; n < live->N; n++)
        live->first_row[n + 1] = live->first_row[n] + (live->is_few[n] ? 0 : mha_live_count(live, n));
}

mha_live_keys mha_live_keys_of(const mha_live_keys *live, size_t first, size_t count)
{
    return (mha_live_keys){.N = count, .S = live->S, .extra = live->extra, .start = live->start + first,
                           .index = live->index, .is_few = live->is_few + first, .first_row = live->first_row + first};
}

mha_rules mha_rules_of(const mha_rules *rules, size_t first)
{
    mha_rules of = *rules;
    of.attn.data = rules->attn.kind ? mask_at(&rules->attn, first, 0, 0) : NULL;
    of.padding.data = rules->padding.kind ? mask_at(&rules->padding, first, 0, 0) : NULL;
    return of;
}

void mha_live_keys_release(mha_live_keys *live)
{
    mha_release(live->memory);
}

static size_t blocks_of_live_keys(const mha_live_keys *live, size_t n)
{
    return mha_divide_up(mha_live_count(live, n), MHA_BLOCK_KEYS);
}

size_t mha_key_blocks(const mha_live_keys *live, size_t n)
{
    return blocks_of_live_keys(live, n) + (live->extra > 0);
}

void mha_key_block_at(const mha_live_keys *live, size_t n, size_t i, mha_key_block *block)
{
    block->is_extra = i == blocks_of_live_keys(live, n);
    block->index = NULL;
    if (block->is_extra) {
        block->first_row = 0;
        block->keys = live->extra;
        block->first_key = live->S;
        return;
    }
    const size_t before = i * MHA_BLOCK_KEYS, keys = mha_smaller(mha_live_count(live, n) - before, MHA_BLOCK_KEYS);
    block->first_row = live->first_row[n] - live->first_row[0] + before;
    block->keys = keys;
    block->first_key = before;
    if (live->index) {
        const size_t *index = live->index + live->start[n] + before;
        block->first_key = index[0];
        /* usually padding is at one end, and the live keys are consecutive */
        if (index[keys - 1] - index[0] != keys - 1)
            block->index = index;
    }
}

size_t mha_next_removed(const mha_live_keys *live, size_t n, size_t s)
{
    /* The number of live keys before s, by bisection. */
    const size_t *index = live->index + live->start[n], live_keys = mha_live_count(live, n);
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

/* What the numbers of queries and keys say without the masks. */
static mha_visible visible_by_numbers(const mha_rules *rules, size_t first_query, size_t last_query,
                                      const mha_key_block *block)
{
    if (block->is_extra)
        return (mha_visible){block->keys, false};
    size_t keys = block->keys;
    bool crosses = false;
    if (rules->is_causal) {
        if (block->first_key > last_query)
            return (mha_visible){0, false};
        while (mha_key_number(block, keys - 1) > last_query)
            keys--;
        crosses = mha_key_number(block, keys - 1) > first_query;
    }
    return (mha_visible){keys, rules->attn.kind || rules->padding.kind || crosses};
}

mha_visible mha_apply_rules(const mha_kernels *kernels, const mha_rules *rules, size_t n, const mha_lanes *lanes,
                            const mha_key_block *block, void *bias)
{
    size_t query = lanes->first / lanes->heads, h = lanes->first % lanes->heads;
    const mha_visible visible = visible_by_numbers(rules, query, (lanes->first + lanes->count - 1) / lanes->heads,
                                                   block);
    if (visible.keys == 0 || !visible.is_biased)
        return visible;
    mha_mask_block of;
    of.attn_kind = rules->attn.kind;
    of.attn_s = rules->attn.stride_s;
    of.padding = rules->padding.kind ? mask_at(&rules->padding, n, 0, 0) : NULL;
    of.padding_kind = rules->padding.kind;
    of.padding_s = rules->padding.stride_s;
    of.index = block->index;
    of.first_key = block->first_key;
    of.is_causal = rules->is_causal;
    for (size_t lane = 0; lane < lanes->count; lane++) {
        of.attn[lane] = rules->attn.kind ? attn_at(rules, n, lanes->first_head + h, query) : NULL;
        of.query[lane] = query;
        if (++h == lanes->heads) {
            h = 0;
            query++;
        }
    }
    return kernels->read_masks(bias, visible.keys, lanes->vectors, lanes->count, &of);
}
