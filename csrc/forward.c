/* SPDX-License-Identifier: Apache-2.0
 *
 * forward.c - multi-head attention, from inputs to outputs:
 *
 *   1   q = query Wq^T + bq     k = key Wk^T + bk     v = value Wv^T + bv        projection.c
 *   2   context_h = softmax(rules(q_h k_h^T)) v_h, for every head h              attention.c
 *   3   output = context Wo^T + bo, the heads side by side                       projection.c
 *
 * (Vaswani et al., "Attention Is All You Need", 2017; torch.nn.MultiheadAttention.)
 *
 * Owns: these steps, and what each hands to the next. Items with far more keys than queries go through them first, and
 * few_queries.c takes their step 2 with the inputs of the keys in place of k and v. schedule.c decides which of the
 * others go together.
 */
#include <math.h>

#include "attention.h"
#include "few_queries.h"
#include "layer.h"
#include "probabilities.h"
#include "projection.h"
#include "schedule.h"

/* What the passes of a call have in common. */
typedef struct {
    const mha_layer *layer;
    const mha_call *call;
    mha_rules rules;
    mha_items items; /* few_queries.c takes those that are picked */
    bool is_few;     /* whether a pass is over these */
} forward;

/* A pass over the items of a batch: what each step is about. Rows of the call are reached by an item's number, those of
 * the workspace by its place in the batch. */
typedef struct {
    const forward *f;
    const mha_batch *batch;
    mha_team team;
    mha_walk queries, keys, results;
    mha_rows query, key, value, context, output;
    mha_projection inputs[MHA_TARGETS], last;
    size_t input_count;
    mha_attention attention; /* its q, k, v and context are what the steps hand on */
    mha_few_queries few;
} pass;

_Static_assert(sizeof(pass) <= MHA_MAX_PASS, "schedule.c has room for it");

/* ---- The plan ---- */

static void plan_queries(pass *p, mha_plan *plan)
{
    const mha_layer *layer = p->f->layer;
    const mha_widths *w = &layer->widths;
    mha_rows *q = &p->attention.q;
    p->queries = (mha_walk){.items = p->batch->count, .length = p->f->call->L};
    p->query = mha_numbered(&p->f->call->query, p->batch->numbers);
    const size_t heads = mha_place_heads(plan, layer->kernels, &p->queries, w->H, w->D, q);
    const mha_target target = {&layer->q, q, heads, (size_t)mha_row_numbers(q)};
    mha_add_projection(p->inputs, &p->input_count, &p->queries, &p->query, &target);
}

static void plan_keys(pass *p, mha_plan *plan)
{
    const mha_layer *layer = p->f->layer;
    const mha_call *call = p->f->call;
    const mha_widths *w = &layer->widths;
    mha_rows *k = &p->attention.k, *v = &p->attention.v;
    mha_walk_live_keys(&p->keys, p->batch, plan);
    const size_t k_heads = mha_place_heads(plan, layer->kernels, &p->keys, w->Hkv, w->D, k);
    const size_t v_heads = mha_place_heads(plan, layer->kernels, &p->keys, w->Hkv, w->Dv, v);
    const mha_target to_k = {&layer->k, k, k_heads, (size_t)mha_row_numbers(k)};
    const mha_target to_v = {&layer->v, v, v_heads, (size_t)mha_row_numbers(v)};
    if (!call->static_k.data)
        mha_add_projection(p->inputs, &p->input_count, &p->keys, &p->key, &to_k);
    if (!call->static_v.data)
        mha_add_projection(p->inputs, &p->input_count, &p->keys, &p->value, &to_v);
}

/* All but q, k, v and context, which the plans of the steps set. */
static void describe_attention(pass *p)
{
    const mha_layer *layer = p->f->layer;
    const mha_call *call = p->f->call;
    const mha_widths *w = &layer->widths;
    const size_t heads = call->wanted == MHA_WANT_AVERAGES ? 1 : w->H;
    mha_attention *a = &p->attention;
    a->kernels = layer->kernels;
    a->batch = p->batch;
    a->rules = &p->f->rules;
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
    a->probabilities.items = p->batch->numbers;
    a->team = &p->team;
}

/* The rows of the output are written in the order in which they lie, unless rows of other items are between them. */
static void plan_output(pass *p, mha_plan *plan)
{
    const mha_layer *layer = p->f->layer;
    const mha_call *call = p->f->call;
    mha_rows *context = &p->attention.context;
    const size_t at = mha_place_rows(plan, layer->kernels, &p->queries, layer->widths.H, layer->widths.Dv, context);
    p->results = p->queries;
    p->context = *context;
    p->output = mha_numbered(&call->output, p->batch->numbers);
    if (call->output.item < call->output.row && p->batch->count == call->N) {
        p->results = (mha_walk){.items = call->L, .length = call->N};
        p->context = mha_by_rows(context);
        p->output = mha_by_rows(&call->output);
    }
    mha_point(plan, &p->context.data, at);
    p->last = (mha_projection){.walk = &p->results, .x = &p->context, .targets = 1,
                               .target = {{&layer->out, &p->output, 0, layer->widths.Eo}}};
}

static void plan_pass(void *memory, const void *context, const mha_batch *batch, const mha_team *team, mha_plan *plan)
{
    pass *p = memory;
    p->f = context;
    p->batch = batch;
    p->team = *team;
    p->key = mha_numbered(&p->f->call->key, batch->numbers);
    p->value = mha_numbered(&p->f->call->value, batch->numbers);
    p->input_count = 0;
    plan_queries(p, plan);
    if (!p->f->is_few)
        plan_keys(p, plan);
    describe_attention(p);
    plan_output(p, plan);
    if (plan->layout.too_large)
        return;

    const mha_layer *layer = p->f->layer;
    mha_attention *a = &p->attention;
    size_t scratch = p->f->is_few ? mha_plan_few_queries(&p->few, a, layer, &p->key, &p->value, plan)
                     : a->wanted  ? mha_plan_probabilities(a, plan)
                                  : mha_plan_attention(a);
    for (size_t i = 0; i < p->input_count; i++)
        scratch = mha_larger(scratch, mha_plan_projection(layer->kernels, &p->inputs[i], team->threads));
    p->team.scratch_bytes = mha_larger(scratch, mha_plan_projection(layer->kernels, &p->last, team->threads));
    mha_place(plan, &p->team.scratch, team->threads, p->team.scratch_bytes, 1);
}

/* ---- The steps ---- */

static mha_status project_inputs(pass *p)
{
    const mha_call *call = p->f->call;
    const mha_widths *w = &p->f->layer->widths;
    const mha_rows k = mha_numbered(&call->static_k, p->batch->numbers);
    const mha_rows v = mha_numbered(&call->static_v, p->batch->numbers);
    if (!p->f->is_few)
        mha_number_rows(&p->keys);
    if (k.data)
        mha_copy_rows(&p->keys, &k, &p->attention.k, w->Hkv, w->D);
    if (v.data)
        mha_copy_rows(&p->keys, &v, &p->attention.v, w->Hkv, w->Dv);
    return mha_project(p->f->layer->kernels, p->inputs, p->input_count, &p->team);
}

/* Items that few_queries.c gives up are no longer picked, and go through another pass. */
static mha_status attend_few_queries(const pass *p)
{
    const mha_status status = mha_attend_few_queries(&p->few);
    for (size_t i = 0; status == MHA_OK && i < p->batch->count; i++)
        if (mha_is_given_up(&p->few, i))
            p->f->items.is_picked[mha_number_of(p->batch, i)] = false;
    return status;
}

static mha_status project_output(const pass *p)
{
    const mha_call *call = p->f->call;
    const mha_widths *w = &p->f->layer->widths;
    const mha_rows context = mha_numbered(&call->context, p->batch->numbers);
    if (context.data)
        mha_copy_rows(&p->queries, &p->attention.context, &context, 1, w->H * w->Dv);
    return call->output.data ? mha_project(p->f->layer->kernels, &p->last, 1, &p->team) : MHA_OK;
}

static mha_status run_pass(void *memory)
{
    pass *p = memory;
    mha_status status = project_inputs(p);
    if (status == MHA_OK)
        status = p->f->is_few         ? attend_few_queries(p)
                 : p->f->call->wanted ? mha_attend_with_probabilities(&p->attention)
                                      : mha_attend(&p->attention);
    if (status == MHA_OK)
        status = project_output(p);
    return status;
}

/* ---- The call ---- */

double mha_forward_operations(const mha_layer *layer, const mha_call *call)
{
    const mha_widths *w = &layer->widths;
    const double N = (double)call->N, L = (double)call->L, S = (double)call->S;
    const double H = (double)w->H, Hkv = (double)w->Hkv, D = (double)w->D, Dv = (double)w->Dv;
    const double in = L * H * D * (double)w->E + S * Hkv * (D * (double)w->Ek + Dv * (double)w->Ev);
    const double out = L * H * Dv * (double)w->Eo;
    const double attention = L * S * H * (D + Dv + (call->wanted ? D : 0));
    return 2 * N * (in + attention + out);
}

mha_status mha_forward(const mha_layer *layer, const mha_call *call)
{
    static const mha_steps steps = {plan_pass, run_pass};
    const mha_team team = {.threads = call->threads, .stop = call->stop};
    forward f = {.layer = layer, .call = call, .is_few = true};
    if (call->N == 0 || call->L == 0)
        return MHA_OK; /* there are no results */
    mha_status status = mha_list_items(call, mha_extra_keys(layer, call), &f.items);
    if (status == MHA_OK) {
        f.rules = mha_rules_of(call, 1 / sqrt((double)layer->widths.D), f.items.padding_adds);
        mha_pick_few_queries(layer, call, &f.items);
        const mha_batch few = mha_pick_items(&f.items, true);
        if (few.count > 0)
            status = mha_run_at_once(&steps, &f, &few, &team);
    }
    if (status == MHA_OK) {
        f.is_few = false;
        const mha_batch others = mha_pick_items(&f.items, false);
        if (others.count > 0)
            status = mha_run_scheduled(&steps, &f, &others, mha_larger(call->L, call->S), &team);
    }
    mha_release(f.items.memory);
    return status;
}
