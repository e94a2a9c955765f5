/* SPDX-License-Identifier: Apache-2.0
 *
 * forward.c - multi-head attention, from inputs to outputs:
 *
 *   1   q = query Wq^T + bq     k = key Wk^T + bk     v = value Wv^T + bv        projection.c
 *   2   context_h = softmax(rules(q_h k_h^T)) v_h, for every head h              attention.c
 *   3   output = context Wo^T + bo, the heads side by side                       projection.c
 *
 * In a layer of a Transformer, residual connections, norms and the feed-forward network stand around them: block.c.
 *
 * (Vaswani et al., "Attention Is All You Need", 2017; torch.nn.MultiheadAttention.)
 *
 * Owns: these steps. pass.c says where their rows are. Items with far more keys than queries go through them first, and
 * few_queries.c takes their step 2 with the inputs of the keys in place of k and v. schedule.c decides which of the
 * others go together.
 */
#include <math.h>

#include "probabilities.h"
#include "rowwise.h"
#include "schedule.h"

static mha_status project_inputs(mha_pass *p)
{
    const mha_call *call = p->passes->call;
    const mha_widths *w = &p->passes->layer->widths;
    const mha_rows static_k = mha_with_items(&call->static_k, p->batch->items);
    const mha_rows static_v = mha_with_items(&call->static_v, p->batch->items);
    const mha_copied_rows k = {p->keys, &static_k, &p->attention.k, w->Hkv, w->D};
    const mha_copied_rows v = {p->keys, &static_v, &p->attention.v, w->Hkv, w->Dv};
    mha_status status = MHA_OK;
    if (p->keys == &p->key_rows)
        mha_list_first_rows(p->keys);
    if (static_k.data)
        status = mha_copy_rows(&k, &p->team);
    if (status == MHA_OK && static_v.data)
        status = mha_copy_rows(&v, &p->team);
    if (status == MHA_OK)
        status = mha_project(p->passes->layer->kernels, p->inputs, p->input_count, &p->team);
    return status;
}

static mha_status attend(mha_pass *p)
{
    return p->passes->is_few         ? mha_attend_few_queries(&p->few)
           : p->passes->call->wanted ? mha_attend_with_probabilities(&p->attention)
                                     : mha_attend(&p->attention);
}

static mha_status project_output(const mha_pass *p)
{
    const mha_call *call = p->passes->call;
    const mha_widths *w = &p->passes->layer->widths;
    const mha_rows context = mha_with_items(&call->context, p->batch->items);
    const mha_copied_rows copied = {&p->queries, &p->attention.context, &context, 1, w->H * w->Dv};
    mha_status status = MHA_OK;
    if (context.data)
        status = mha_copy_rows(&copied, &p->team);
    if (status == MHA_OK && call->output.data)
        status = mha_project(p->passes->layer->kernels, &p->last, 1, &p->team);
    return status;
}

static mha_status run_pass(mha_pass *p)
{
    const mha_block_pass *block = p->block.block ? &p->block : NULL;
    mha_list_first_rows(&p->queries);
    mha_status status = block ? mha_begin_block(block) : MHA_OK;
    if (status == MHA_OK)
        status = project_inputs(p);
    if (status == MHA_OK)
        status = attend(p);
    if (status == MHA_OK)
        status = project_output(p);
    if (status == MHA_OK && block)
        status = mha_end_block(block, p->batch);
    if (status == MHA_OK && p->passes->is_few)
        status = mha_give_up_items(&p->few, p->passes->call, p->passes->items, p->passes->saved);
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
    const mha_block *block = call->block && call->block->linear1 ? call->block : NULL;
    const double hidden = block ? (double)(block->linear1->panels.split.width + block->linear2->panels.depth) : 0;
    return 2 * N * (in + attention + out + L * hidden * (double)w->E);
}

mha_status mha_forward(const mha_layer *layer, const mha_call *call)
{
    const mha_team team = {.threads = call->threads, .stop = call->stop};
    mha_items items;
    mha_saved saved = {.queries = 0};
    mha_passes passes = {.layer = layer, .call = call, .items = &items, .is_few = true, .saved = &saved};
    size_t rows;
    if (call->N == 0 || call->L == 0)
        return MHA_OK; /* there are no results */
    if (__builtin_mul_overflow(call->N, call->L, &rows))
        return MHA_TOO_LARGE; /* so mha_walk_rows() cannot overflow */
    mha_status status =
        mha_list_items(call->N, call->S, &call->key_padding_mask, mha_extra_keys(layer, call), &items);
    if (status == MHA_OK) {
        passes.rules = mha_rules_of(call, 1 / sqrt((double)layer->widths.D), items.padding_adds);
        mha_pick_few_queries(layer, call, &items);
        const mha_batch few = mha_pick_items(&items, true);
        if (few.count > 0)
            status = mha_run_at_once(run_pass, &passes, &few, &team);
    }
    if (status == MHA_OK) {
        passes.is_few = false;
        const mha_batch others = mha_pick_items(&items, false);
        if (others.count > 0)
            status = mha_run_scheduled(run_pass, &passes, &others, mha_larger(call->L, call->S), &team);
        mha_put_back(&saved);
    }
    mha_release(saved.memory);
    mha_release(items.memory);
    return status;
}
