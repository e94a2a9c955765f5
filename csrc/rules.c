/* SPDX-License-Identifier: Apache-2.0
 *
 * rules.c - turns masks and the causal order into what a panel sees of a block of keys.
 *
 * Owns: nothing. The kernels read the masks of a block.
 */
#include "rules.h"

#include "philox.h"

mha_rules mha_rules_of(const mha_call *call, double scale, bool padding_adds)
{
    mha_rules rules = {.scale = scale, .attn = call->attn_mask, .is_causal = call->is_causal,
                       .empty_row = call->empty_row, .dropout_p = call->dropout_p};
    if (padding_adds)
        rules.padding = call->key_padding_mask;
    if (call->dropout_p > 0)
        mha_dropout_key(call->dropout_seed, call->dropout_call, rules.dropout_key);
    return rules;
}

static const char *attn_at(const mha_rules *rules, size_t n, size_t h, size_t l)
{
    return rules->attn_items ? mha_mask_at(&rules->attn, 0, h, l) + rules->attn_items[n]
                             : mha_mask_at(&rules->attn, n, h, l);
}

/* The keys that the causal order leaves to the panel, and whether a bias is needed. */
static mha_visible visible_by_order(const mha_rules *rules, size_t first_query, size_t last_query,
                                    const mha_key_block *block)
{
    if (block->is_extra)
        return (mha_visible){block->keys, false};
    size_t keys = block->keys;
    bool crosses = false;
    if (rules->is_causal) {
        if (block->first_key > last_query)
            return (mha_visible){0, false};
        while (mha_key_index(block, keys - 1) > last_query)
            keys--;
        crosses = mha_key_index(block, keys - 1) > first_query;
    }
    return (mha_visible){keys, rules->attn.kind || rules->padding.kind || crosses};
}

mha_visible mha_apply_rules(const mha_kernels *kernels, const mha_rules *rules, size_t n, const mha_lanes *lanes,
                            const mha_key_block *block, void *bias)
{
    size_t query = lanes->first / lanes->heads, h = lanes->first % lanes->heads;
    const mha_visible visible = visible_by_order(rules, query, (lanes->first + lanes->count - 1) / lanes->heads, block);
    if (visible.keys == 0 || !visible.is_biased)
        return visible;
    mha_mask_block of;
    of.attn_kind = rules->attn.kind;
    of.attn_s_bytes = rules->attn.stride_s;
    of.padding = rules->padding.kind ? mha_mask_at(&rules->padding, n, 0, 0) : NULL;
    of.padding_kind = rules->padding.kind;
    of.padding_s_bytes = rules->padding.stride_s;
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
