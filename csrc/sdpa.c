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
 * Owns: the plan of a call.
 */
#include <string.h>

#include "attention.h"
#include "cpu.h"
#include "philox.h"
#include "spare.h"

/* Offsets into the workspace. */
typedef struct {
    size_t q, k, v, context, mask; /* [items]: tables of offsets into the arrays, in numbers; for the mask in bytes */
    size_t zeros;                  /* a row for inputs without features */
    size_t scratch, scratch_bytes;
} offsets;

typedef struct {
    const mha_sdpa_call *call;
    const mha_kernels *kernels;
    size_t groups; /* of the heads */
    size_t items;
    mha_live_keys live;
    mha_rules rules;
    offsets at;
    char *workspace;
} sdpa;

double mha_sdpa_operations(const mha_sdpa_call *call)
{
    double items = (double)call->query.heads;
    for (size_t i = 0; i < call->axes; i++)
        items *= (double)call->length[i];
    return 2 * items * (double)call->L * (double)call->S * ((double)call->D + (double)call->Dv);
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

/* ---- Tables ---- */

static ptrdiff_t *table(const sdpa *s, size_t offset)
{
    return (ptrdiff_t *)(void *)(s->workspace + offset);
}

/* Lists for every item the distance from the beginning of an array to the first row of the item's first head, in units
 * of `unit` bytes. */
static void list_items(const sdpa *s, const ptrdiff_t *stride_axes, ptrdiff_t stride_h, size_t heads, size_t unit,
                       ptrdiff_t *items)
{
    for (size_t i = 0; i < s->items; i++) {
        size_t rest = i / s->groups;
        ptrdiff_t at = (ptrdiff_t)(i % s->groups * heads / s->groups) * stride_h;
        for (size_t axis = s->call->axes; axis-- > 0; rest /= s->call->length[axis])
            at += (ptrdiff_t)(rest % s->call->length[axis]) * stride_axes[axis];
        items[i] = at / (ptrdiff_t)unit;
    }
}

static void list_offsets(const sdpa *s, const mha_heads *x, size_t offset)
{
    list_items(s, x->stride_axes, x->stride_h, x->heads, s->kernels->size, table(s, offset));
}

static void fill_workspace(sdpa *s)
{
    const mha_sdpa_call *call = s->call;
    list_offsets(s, &call->query, s->at.q);
    list_offsets(s, &call->key, s->at.k);
    list_offsets(s, &call->value, s->at.v);
    list_offsets(s, &call->output, s->at.context);
    if (call->mask.kind) {
        list_items(s, call->mask_axes, call->mask.stride_h, call->query.heads, 1, table(s, s->at.mask));
        s->rules.attn_item = table(s, s->at.mask);
    }
    if (call->D == 0)
        memset(s->workspace + s->at.zeros, 0, s->kernels->size);
    /* Every item has an entry in the tables, so its keys are numbered from 0. */
    memset(s->live.first_row, 0, (s->items + 1) * sizeof *s->live.first_row);
}

/* ---- The plan ---- */

static mha_rows describe_rows(const sdpa *s, const mha_heads *x, size_t offset)
{
    const ptrdiff_t size = (ptrdiff_t)s->kernels->size;
    return (mha_rows){.data = (char *)x->data, /* attention.c writes to the output alone */
                      .stride_h = x->stride_h / size,
                      .stride_l = x->stride_l / size,
                      .items = table(s, offset)};
}

static mha_attention describe_attention(const sdpa *s)
{
    const mha_sdpa_call *call = s->call;
    const size_t H = call->query.heads / s->groups;
    mha_attention attention = {
        .kernels = s->kernels,
        .N = s->items, .L = call->L, .H = H, .Hkv = 1, .D = call->D, .Dv = call->Dv,
        .scale = call->scale,
        .live = &s->live, .rules = &s->rules, .empty_row = MHA_EMPTY_ROW_ZERO,
        .dropout_p = call->dropout_p,
        .threads = call->threads, .scratch_bytes = s->at.scratch_bytes, .stop = call->stop,
    };
    mha_split_queries(&attention);
    if (!s->workspace)
        return attention;
    attention.q = describe_rows(s, &call->query, s->at.q);
    attention.k = describe_rows(s, &call->key, s->at.k);
    attention.v = describe_rows(s, &call->value, s->at.v);
    attention.context = describe_rows(s, &call->output, s->at.context);
    attention.scratch = s->workspace + s->at.scratch;
    mha_dropout_key(call->dropout_seed, 0, attention.dropout_key);
    if (call->D == 0) { /* every score is 0, as with one feature that is always 0 */
        attention.q = attention.k = (mha_rows){s->workspace + s->at.zeros, 0, 0, 0, NULL};
        attention.D = 1;
        attention.scale = 1;
    }
    return attention;
}

static mha_status plan_workspace(sdpa *s)
{
    mha_layout layout = {0};
    offsets *at = &s->at;
    at->q = mha_reserve(&layout, s->items, 1, sizeof(ptrdiff_t));
    at->k = mha_reserve(&layout, s->items, 1, sizeof(ptrdiff_t));
    at->v = mha_reserve(&layout, s->items, 1, sizeof(ptrdiff_t));
    at->context = mha_reserve(&layout, s->items, 1, sizeof(ptrdiff_t));
    at->mask = mha_reserve(&layout, s->call->mask.kind ? s->items : 0, 1, sizeof(ptrdiff_t));
    at->zeros = mha_reserve(&layout, 1, 1, s->kernels->size);
    mha_attention attention = describe_attention(s);
    attention.D += attention.D == 0;
    at->scratch_bytes = mha_attention_scratch(&attention);
    at->scratch = mha_reserve(&layout, s->call->threads, at->scratch_bytes, 1);
    return mha_take_workspace(&layout, &s->workspace);
}

mha_status mha_sdpa(const mha_sdpa_call *call)
{
    sdpa s = {.call = call, .kernels = mha_cpu_kernels(call->dtype)};
    mha_status status = count_items(&s);
    if (status != MHA_OK || s.items == 0 || call->query.heads == 0 || call->L == 0 || call->Dv == 0)
        return status;
    const mha_call masks = {.N = s.items, .S = call->S, .attn_mask = call->mask, .is_causal = call->is_causal};
    status = mha_read_masks(&masks, 0, &s.live, &s.rules);
    if (status != MHA_OK)
        goto done;
    status = plan_workspace(&s);
    if (status != MHA_OK)
        goto done;
    fill_workspace(&s);
    const mha_attention attention = describe_attention(&s);
    status = mha_attend(&attention);
done:
    mha_give_workspace(s.workspace);
    mha_live_keys_release(&s.live);
    return status;
}
