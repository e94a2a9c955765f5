/* SPDX-License-Identifier: Apache-2.0
 *
 * sdpa.c - attention without projections, on rows that stay where the caller has them.
 *
 * In attention.c an item has H heads, which share keys and values in equal groups. Here keys and values may have
 * different numbers of heads, any number of axes may precede the heads, and each input has strides of its own. So the
 * heads of a query are divided into groups that share both key and value. Each group becomes an item, and tables say
 * where its rows begin:
 *
 *      H = 8, 2 key heads, 4 value heads        group   0   1   2   3
 *                                               query  0 1 2 3 4 5 6 7
 *                                               key     0   0   1   1
 *                                               value   0   1   2   3
 *
 * Owns: these tables.
 */
#include <math.h>
#include <string.h>

#include "attention.h"
#include "cpu.h"
#include "philox.h"
#include "spare.h"

typedef struct {
    const mha_sdpa_call *call;
    size_t groups; /* of the heads */
    size_t items;
    mha_items list;
    mha_rules rules;
    mha_team team;
    mha_attention attention;
    ptrdiff_t *attn_items;
    char *zeros; /* a row for inputs without features */
} sdpa;

/* A vector of queries takes as long as one, unless there is a handful of keys. */
double mha_sdpa_operations(const mha_sdpa_call *call)
{
    const double lanes = call->S <= MHA_HANDFUL ? 1 : (double)mha_cpu_kernels(call->dtype)->lanes;
    double items = (double)call->query.heads;
    for (size_t i = 0; i < call->axes; i++)
        items *= (double)call->length[i];
    return 2 * items * ceil((double)call->L / lanes) * lanes * (double)call->S * ((double)call->D + (double)call->Dv);
}

/* The least common multiple. Both numbers divide the number of query heads, and so does the result. */
static size_t count_groups(size_t a, size_t b)
{
    size_t divisor = a;
    for (size_t rest = b; rest;) {
        const size_t next = divisor % rest;
        divisor = rest;
        rest = next;
    }
    return divisor ? a / divisor * b : 0;
}

static mha_status count_items(sdpa *s)
{
    s->groups = count_groups(s->call->key.heads, s->call->value.heads);
    s->items = s->groups;
    for (size_t i = 0; i < s->call->axes; i++)
        if (__builtin_mul_overflow(s->items, s->call->length[i], &s->items))
            return MHA_TOO_LARGE;
    return MHA_OK;
}

/* ---- The plan ---- */

/* Lists for every item the distance in bytes from the beginning of an array to the first row of its first head. */
static void list_items(const sdpa *s, const ptrdiff_t *axes, ptrdiff_t head, size_t heads, ptrdiff_t *items)
{
    for (size_t i = 0; i < s->items; i++) {
        size_t rest = i / s->groups;
        items[i] = (ptrdiff_t)(i % s->groups * heads / s->groups) * head;
        for (size_t axis = s->call->axes; axis-- > 0; rest /= s->call->length[axis])
            items[i] += (ptrdiff_t)(rest % s->call->length[axis]) * axes[axis];
    }
}

/* Rows of an array of the call; their items are to be listed. */
static void place_items(const sdpa *s, const mha_heads *x, mha_rows *rows, mha_plan *plan)
{
    *rows = x->rows;
    rows->item = 1;
    mha_place(plan, &rows->items, s->items, 1, sizeof *rows->items);
}

static void plan_attention(sdpa *s, mha_plan *plan)
{
    const mha_sdpa_call *call = s->call;
    mha_attention *a = &s->attention;
    a->kernels = mha_cpu_kernels(call->dtype);
    a->narrow = call->dtype == MHA_BFLOAT16 ? mha_cpu_narrow(MHA_BF16) : NULL;
    a->batch = &s->list.all;
    a->rules = &s->rules;
    a->L = call->L;
    a->H = call->query.heads / s->groups;
    a->Hkv = 1;
    a->D = call->D;
    a->Dv = call->Dv;
    a->team = &s->team;
    place_items(s, &call->query, &a->q, plan);
    place_items(s, &call->key, &a->k, plan);
    place_items(s, &call->value, &a->v, plan);
    place_items(s, &call->output, &a->context, plan);
    mha_place(plan, &s->attn_items, call->mask.kind ? s->items : 0, 1, sizeof *s->attn_items);
    if (call->D == 0) { /* every score is 0, as with one feature that is always 0 */
        a->D = 1;
        s->rules.scale = 1;
    }
    mha_place(plan, &s->zeros, 1, 1, a->kernels->size);
    s->team.scratch_bytes = mha_plan_attention(a);
    mha_place(plan, &s->team.scratch, s->team.threads, s->team.scratch_bytes, 1);
}

static void list_rows(const sdpa *s, const mha_heads *x, const mha_rows *rows)
{
    list_items(s, x->axes, x->rows.head, x->heads, (ptrdiff_t *)rows->items);
}

/* Fills the tables, after the workspace is taken. */
static void fill_workspace(sdpa *s)
{
    const mha_sdpa_call *call = s->call;
    mha_attention *a = &s->attention;
    list_rows(s, &call->query, &a->q);
    list_rows(s, &call->key, &a->k);
    list_rows(s, &call->value, &a->v);
    list_rows(s, &call->output, &a->context);
    if (call->mask.kind) {
        list_items(s, call->mask_axes, call->mask.stride_h, call->query.heads, s->attn_items);
        s->rules.attn_items = s->attn_items;
    }
    if (call->D == 0) {
        memset(s->zeros, 0, a->kernels->size);
        a->q = a->k = (mha_rows){.data = s->zeros, .type = call->dtype};
    }
}

mha_status mha_sdpa(const mha_sdpa_call *call)
{
    sdpa s = {.call = call, .team = {.threads = call->threads, .stop = call->stop}};
    const mha_mask no_padding = {.kind = MHA_MASK_NONE};
    mha_plan plan;
    mha_begin_plan(&plan);
    char *workspace = NULL;
    mha_status status = count_items(&s);
    if (status != MHA_OK || s.items == 0 || call->query.heads == 0 || call->L == 0 || call->Dv == 0)
        return status;
    s.rules = (mha_rules){.scale = call->scale, .attn = call->mask, .is_causal = call->is_causal,
                          .empty_row = MHA_EMPTY_ROW_ZERO, .dropout_p = call->dropout_p};
    mha_dropout_key(call->dropout_seed, 0, s.rules.dropout_key);
    status = mha_list_items(s.items, call->S, &no_padding, 0, &s.list);
    if (status != MHA_OK)
        goto done;
    plan_attention(&s, &plan);
    status = mha_take_workspace(&plan, &workspace);
    if (status != MHA_OK)
        goto done;
    fill_workspace(&s);
    status = mha_attend(&s.attention);
done:
    mha_give_workspace(workspace);
    mha_release(s.list.memory);
    return status;
}
