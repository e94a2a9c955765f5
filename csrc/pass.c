/* SPDX-License-Identifier: Apache-2.0
 *
 * pass.c - plans a pass: where the rows of each step are, and in which order it goes through them.
 *
 * Owns: the layout of the workspace.
 */
#include "pass.h"

#include "probabilities.h"

/* Bytes of q, k or v that stay in the first-level cache, so that their order does not matter. */
enum { MAX_NEAR_BYTES = 49152 };

/* Whether other items' rows lie between those of an item, as in an array (length, N, features). */
static bool lies_by_rows(const mha_pass *p, const mha_rows *x)
{
    return p->batch->count > 1 && p->batch->count == p->passes->call->N && x->item > 0 && x->item < x->row;
}

/* Whether the walks through the inputs visit rows in the order in which these lie. The rows of an item are then apart
 * in the workspace. */
static bool goes_by_rows(const mha_pass *p)
{
    const mha_layer *layer = p->passes->layer;
    const mha_call *call = p->passes->call;
    const mha_widths *w = &layer->widths;
    const size_t width = mha_larger(w->H * w->D, w->Hkv * mha_larger(w->D, w->Dv)), size = layer->kernels->size;
    const size_t row = mha_row_stride(width, layer->kernels->lanes, size) * size;
    return mha_larger(call->L, call->S) <= MAX_NEAR_BYTES / row / p->batch->count && lies_by_rows(p, &call->query) &&
           lies_by_rows(p, &call->key) && lies_by_rows(p, &call->value);
}

/* Rows that walk.c placed, as a target. */
static mha_target target_of(const mha_panels *panels, const mha_rows *y, size_t head_width)
{
    return (mha_target){panels, y, head_width, (size_t)mha_placed_distance(y) / mha_size_of(y->type)};
}

/* Whether rows that padding hides as keys are not computed as queries either. Masks, the causal order and dropout refer
 * to queries by their indices, and few_queries.c has the same number of queries in each item. There, all rows are
 * computed. */
static bool skips_padding(const mha_pass *p)
{
    const mha_call *call = p->passes->call;
    return call->block && call->block->zeroes_padding && !p->passes->is_few && !call->attn_mask.kind &&
           !call->is_causal && !(call->dropout_p > 0) && mha_all_live_keys(p->batch) < p->batch->count * call->S;
}

static void walk_queries(mha_pass *p, mha_plan *plan)
{
    p->attention.is_live_only = skips_padding(p);
    if (p->attention.is_live_only)
        mha_walk_live_keys(&p->queries, p->batch, plan);
    else
        p->queries = (mha_walk){.items = p->batch->count, .length = p->passes->call->L, .by_rows = p->by_rows};
}

/* Returns the bytes of scratch that each thread needs. */
static size_t plan_block(mha_pass *p, mha_plan *plan)
{
    mha_block_pass *b = &p->block;
    b->block = p->passes->call->block;
    if (!b->block)
        return 0;
    b->kernels = p->passes->layer->kernels;
    b->walk = &p->queries;
    b->team = &p->team;
    b->width = p->passes->layer->widths.E;
    b->x = p->query;
    b->output = mha_with_items(&p->passes->call->output, p->batch->items);
    return mha_plan_block(b, plan);
}

static const mha_rows *projected_query(const mha_pass *p)
{
    return p->block.block && p->block.block->norm_first ? &p->block.normal : &p->query;
}

/* x is the key or the value. */
static const mha_rows *projected(const mha_pass *p, const mha_rows *x)
{
    return p->block.block && p->block.block->is_self_attention ? projected_query(p) : x;
}

static void plan_queries(mha_pass *p, mha_plan *plan)
{
    const mha_layer *layer = p->passes->layer;
    const mha_widths *w = &layer->widths;
    mha_rows *q = &p->attention.q;
    const size_t heads = mha_place_heads(plan, layer->kernels, &p->queries, w->H, w->D, q);
    const mha_target target = target_of(&layer->q, q, heads);
    mha_add_projection(p->inputs, &p->input_count, &p->queries, projected_query(p), &target);
}

static const mha_walk *walk_keys(mha_pass *p, mha_plan *plan)
{
    const size_t S = p->passes->call->S;
    if (p->attention.is_live_only)
        return &p->queries;
    if (mha_all_live_keys(p->batch) == p->batch->count * S)
        p->key_rows = (mha_walk){.items = p->batch->count, .length = S, .by_rows = p->by_rows};
    else
        mha_walk_live_keys(&p->key_rows, p->batch, plan);
    return &p->key_rows;
}

static void plan_keys(mha_pass *p, mha_plan *plan)
{
    const mha_layer *layer = p->passes->layer;
    const mha_call *call = p->passes->call;
    const mha_widths *w = &layer->widths;
    mha_rows *k = &p->attention.k, *v = &p->attention.v;
    p->keys = walk_keys(p, plan);
    const size_t k_heads = mha_place_heads(plan, layer->kernels, p->keys, w->Hkv, w->D, k);
    const size_t v_heads = mha_place_heads(plan, layer->kernels, p->keys, w->Hkv, w->Dv, v);
    const mha_target to_k = target_of(&layer->k, k, k_heads), to_v = target_of(&layer->v, v, v_heads);
    if (!call->static_k.data)
        mha_add_projection(p->inputs, &p->input_count, p->keys, projected(p, &p->key), &to_k);
    if (!call->static_v.data)
        mha_add_projection(p->inputs, &p->input_count, p->keys, projected(p, &p->value), &to_v);
}

/* All but q, k, v and context, which the plans of the steps set. */
static void describe_attention(mha_pass *p)
{
    const mha_layer *layer = p->passes->layer;
    const mha_call *call = p->passes->call;
    const mha_widths *w = &layer->widths;
    const size_t heads = call->wanted == MHA_WANT_AVERAGES ? 1 : w->H;
    mha_attention *a = &p->attention;
    a->kernels = layer->kernels;
    a->narrow = layer->narrow_attention;
    a->batch = p->batch;
    a->rules = &p->passes->rules;
    a->L = call->L;
    a->H = w->H;
    a->Hkv = w->Hkv;
    a->D = w->D;
    a->Dv = w->Dv;
    a->extra_k = layer->extra_k;
    a->extra_v = layer->extra_v;
    a->wanted = call->wanted;
    a->probabilities = mha_contiguous_rows(call->attn_weights, layer->kernels->dtype, heads, call->L,
                                           call->S + p->batch->extra);
    a->probabilities.items = p->batch->items;
    a->team = &p->team;
}

static void plan_output(mha_pass *p, mha_plan *plan)
{
    const mha_layer *layer = p->passes->layer;
    mha_rows *context = &p->attention.context;
    mha_place_rows(plan, layer->kernels, &p->queries, layer->widths.H, layer->widths.Dv, context);
    p->output = mha_with_items(&p->passes->call->output, p->batch->items);
    if (p->block.block) {
        p->last = (mha_projection){.walk = &p->queries, .x = context, .targets = 1,
                                   .target = {target_of(&layer->out, &p->block.attended, 0)}};
        return;
    }
    p->results = p->queries;
    p->results.by_rows = lies_by_rows(p, &p->output);
    p->last = (mha_projection){.walk = &p->results, .x = context, .targets = 1,
                               .target = {{&layer->out, &p->output, 0, layer->widths.Eo}}};
}

void mha_plan_pass(mha_pass *p, const mha_passes *passes, const mha_batch *batch, const mha_team *team, mha_plan *plan)
{
    p->passes = passes;
    p->batch = batch;
    p->team = *team;
    p->query = mha_with_items(&p->passes->call->query, batch->items);
    p->key = mha_with_items(&p->passes->call->key, batch->items);
    p->value = mha_with_items(&p->passes->call->value, batch->items);
    p->by_rows = goes_by_rows(p);
    p->input_count = 0;
    p->keys = NULL;
    walk_queries(p, plan);
    size_t scratch = plan_block(p, plan);
    plan_queries(p, plan);
    if (!p->passes->is_few)
        plan_keys(p, plan);
    describe_attention(p);
    plan_output(p, plan);
    if (mha_is_too_large(&plan->layout))
        return;

    const mha_layer *layer = p->passes->layer;
    mha_attention *a = &p->attention;
    const mha_rows *key = projected(p, &p->key), *value = projected(p, &p->value);
    scratch = mha_larger(scratch, p->passes->is_few ? mha_plan_few_queries(&p->few, a, layer, key, value, plan)
                                  : a->wanted       ? mha_plan_probabilities(a, plan)
                                                    : mha_plan_attention(a));
    for (size_t i = 0; i < p->input_count; i++)
        scratch = mha_larger(scratch, mha_plan_projection(layer->kernels, &p->inputs[i], team->threads));
    p->team.scratch_bytes = mha_larger(scratch, mha_plan_projection(layer->kernels, &p->last, team->threads));
    mha_place(plan, &p->team.scratch, team->threads, p->team.scratch_bytes, 1);
}
