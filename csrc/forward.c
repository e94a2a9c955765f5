/* SPDX-License-Identifier: Apache-2.0
 *
 * forward.c - multi-head attention, from inputs to outputs:
 *
 *      q = query Wq^T + bq     k = key Wk^T + bk     v = value Wv^T + bv          (projection.c)
 *      context_h = softmax(q_h k_h^T / sqrt(D) + masks) v_h, for every head h     (attention.c, few_queries.c)
 *      output = context Wo^T + bo, the heads side by side                         (projection.c)
 *
 * (Vaswani et al., "Attention Is All You Need", 2017; torch.nn.MultiheadAttention.)
 *
 * Owns: the plan of a call, which says where everything lies in its workspace. It also decides whether the whole batch
 * goes through these steps at once, or in chunks of items, each in one thread.
 */
#include <math.h>
#include <string.h>

#include "attention.h"
#include "few_queries.h"
#include "layer.h"
#include "philox.h"
#include "projection.h"
#include "spare.h"
#include "threads.h"

enum {
    MIN_APART = 4, /* vectors; narrower heads are not kept apart, since a panel is cut at the ends of such a head */
    /* queries or keys that a chunk has at least; with fewer, a projection reads its weights too often */
    MIN_CHUNK_ROWS = 96,
    MAX_SMALL_CHUNK_ROWS = 384, /* one chunk per thread is enough if chunks have at most this many queries or keys */
    CHUNKS_PER_THREAD = 8,      /* otherwise, so that threads end at about the same time; twice as many with padding */
    MAX_EXCESS = 32,            /* one chunk per thread unless a thread gets over 1 / MAX_EXCESS more than its share */
};

/* Where the rows of all heads lie in the workspace: an offset in bytes, and the distances between rows and between
 * heads in numbers. */
typedef struct {
    size_t offset, row_stride, head_stride;
    size_t head_width; /* of heads that have a matrix each; 0: all heads of a row are side by side */
} matrix;

/* Offsets into the workspace. Where heads are wide, each has a matrix of its own: its rows are read one after another,
 * and with all heads side by side each row would be on another page. Keys and values have a row for every live key of
 * every item. The rows of the extra keys are kept apart. */
typedef struct {
    matrix q, k, v, context, extra_k, extra_v;
    size_t q_addresses, k_addresses, v_addresses, context_addresses; /* tables of row addresses */
    size_t maximum, sum;
    size_t scratch;
} offsets;

/* A call for all its items, or for some of them. If for some, `call` describes these alone. Only its masks still begin
 * with the first item of the batch, and `rules` is used in their place. */
typedef struct {
    const mha_layer *layer;
    const mha_call *call;
    size_t first_item, items_in_all;
    mha_live_keys live;
    mha_rules rules;
    mha_few_queries few;
    offsets at;
    mha_team team;
    char *workspace; /* NULL while it is planned */
} pass;

/* An address in the workspace. NULL while the workspace is planned. */
static char *at_offset(const pass *f, size_t offset)
{
    return f->workspace ? f->workspace + offset : NULL;
}

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

/* ---- Rows ---- */

/* Lists the address of every row of an input. With `only` these are the live keys of items that project their keys. */
static void list_rows(const mha_array *x, size_t N, size_t length, const mha_live_keys *only, const char **row)
{
    for (size_t n = 0; n < N; n++) {
        const char *item = (const char *)x->data + (ptrdiff_t)n * x->stride_n;
        if (only && only->is_few[n])
            continue;
        if (only && only->index)
            for (size_t i = only->start[n]; i < only->start[n + 1]; i++)
                *row++ = item + (ptrdiff_t)only->index[i] * x->stride_l;
        else
            for (size_t l = 0; l < length; l++)
                *row++ = item + (ptrdiff_t)l * x->stride_l;
    }
}

static bool same_input(const mha_array *a, const mha_array *b)
{
    return a->data == b->data && a->stride_n == b->stride_n && a->stride_l == b->stride_l &&
           a->stride_e == b->stride_e;
}

/* Structs are filled in where they stay. gcc would copy a struct with vector loads right after its members were
 * written, and such loads wait until the stores have reached the cache. */
static void set_target(const pass *f, const mha_panels *panels, const matrix *to, mha_target *target)
{
    target->panels = panels;
    target->y = at_offset(f, to->offset);
    target->stride = to->row_stride;
    target->head_width = to->head_width;
    target->head_stride = to->head_stride;
    target->group_rows = 0;
}

/* Describes the input projections. Inputs that are the same are joined into one projection. Returns the number of
 * projections. */
static size_t describe_inputs(const pass *f, mha_projection projections[MHA_TARGETS])
{
    const mha_call *call = f->call;
    const mha_layer *layer = f->layer;
    const offsets *at = &f->at;
    const size_t keys = mha_live_rows(&f->live);
    const bool every_key = keys == call->N * call->S;
    const struct {
        const mha_array *x;
        size_t rows, addresses;
        const mha_panels *panels;
        const matrix *to;
    } inputs[MHA_TARGETS] = {
        {&call->query, call->N * call->L, at->q_addresses, &layer->q, &at->q},
        {&call->key, call->static_k.data ? 0 : keys, at->k_addresses, &layer->k, &at->k},
        {&call->value, call->static_v.data ? 0 : keys, at->v_addresses, &layer->v, &at->v},
    };
    size_t count = 0;
    for (size_t i = 0; i < MHA_TARGETS; i++) {
        const bool as_before = i > 0 && same_input(inputs[i].x, inputs[i - 1].x) &&
                               inputs[i].rows == inputs[i - 1].rows && (i > 1 || every_key) &&
                               inputs[i].panels->depth == inputs[i - 1].panels->depth;
        mha_projection *p = &projections[as_before ? count - 1 : count++];
        if (!as_before) {
            p->rows = inputs[i].rows;
            p->row_address = (const char *const *)(void *)at_offset(f, inputs[i].addresses);
            p->stride_e = inputs[i].x->stride_e;
            p->targets = 0;
        }
        set_target(f, inputs[i].panels, inputs[i].to, &p->target[p->targets++]);
    }
    return count;
}

/* Whether rows of other items lie between the rows of these items in the output. */
static bool is_interleaved(const pass *f)
{
    return !f->call->output_batch_first && f->items_in_all > f->call->N;
}

/* Describes the output projection. Its rows are in the order of the output. If they are interleaved with others, they
 * are listed item after item. */
static void describe_output(const pass *f, mha_projection *p)
{
    const size_t Eo = f->layer->widths.Eo;
    mha_target *output = p->target;
    p->rows = f->call->N * f->call->L;
    p->row_address = (const char *const *)(void *)at_offset(f, f->at.context_addresses);
    p->stride_e = (ptrdiff_t)f->layer->kernels->size;
    p->targets = 1;
    output->panels = &f->layer->out;
    output->y = f->call->output;
    output->stride = Eo;
    output->head_width = output->group_rows = 0;
    if (is_interleaved(f)) {
        output->stride = f->items_in_all * Eo;
        output->group_rows = f->call->L;
        output->group_stride = Eo;
    }
}

static void list_input_rows(const pass *f)
{
    const mha_call *call = f->call;
    char *workspace = f->workspace;
    list_rows(&call->query, call->N, call->L, NULL, (const char **)(void *)(workspace + f->at.q_addresses));
    if (!call->static_k.data)
        list_rows(&call->key, call->N, call->S, &f->live, (const char **)(void *)(workspace + f->at.k_addresses));
    if (!call->static_v.data)
        list_rows(&call->value, call->N, call->S, &f->live, (const char **)(void *)(workspace + f->at.v_addresses));
}

static void list_context_rows(const pass *f)
{
    const mha_call *call = f->call;
    const size_t stride = f->at.context.row_stride * f->layer->kernels->size;
    const char **context_addresses = (const char **)(void *)(f->workspace + f->at.context_addresses);
    const bool item_after_item = call->output_batch_first || is_interleaved(f);
    for (size_t r = 0; r < call->N * call->L; r++) {
        const size_t n_l = item_after_item ? r : r % call->N * call->L + r / call->N;
        context_addresses[r] = f->workspace + f->at.context.offset + n_l * stride;
    }
}

/* ---- Keys that are not projected ---- */

/* Copies the live keys or values to where a projection would have written them. */
static void copy_projected(const pass *f, const mha_projected *x, size_t width, const matrix *m)
{
    const mha_live_keys *live = &f->live;
    const size_t size = f->layer->kernels->size;
    char *to = f->workspace + m->offset;
    for (size_t n = 0; n < live->N; n++)
        for (size_t i = 0; i < mha_live_count(live, n); i++, to += m->row_stride * size) {
            const size_t s = live->index ? live->index[live->start[n] + i] : i;
            const char *from = (const char *)x->data + (ptrdiff_t)n * x->stride_n + (ptrdiff_t)s * x->stride_s;
            for (size_t h = 0; h < f->layer->widths.Hkv; h++)
                mha_copy_row(from + (ptrdiff_t)h * x->stride_h, x->stride_d, width, size,
                             to + h * m->head_stride * size);
        }
}

/* The extra keys are bias_k and bias_v, then zeros. */
static void write_extra_keys(const pass *f)
{
    const mha_layer *layer = f->layer;
    const size_t size = layer->kernels->size, extra = f->live.extra;
    char *k = f->workspace + f->at.extra_k.offset, *v = f->workspace + f->at.extra_v.offset;
    memset(k, 0, extra * f->at.extra_k.row_stride * size);
    memset(v, 0, extra * f->at.extra_v.row_stride * size);
    if (layer->bias_k) {
        memcpy(k, layer->bias_k, layer->widths.Hkv * layer->widths.D * size);
        memcpy(v, layer->bias_v, layer->widths.Hkv * layer->widths.Dv * size);
    }
}

/* ---- The plan ---- */

static matrix reserve_side_by_side(mha_layout *layout, const mha_kernels *kernels, size_t rows, size_t heads,
                                   size_t width)
{
    const size_t row = mha_row_stride(heads * width, kernels->lanes, kernels->size);
    return (matrix){.offset = mha_reserve(layout, rows, row, kernels->size), .row_stride = row, .head_stride = width};
}

static matrix reserve_heads(mha_layout *layout, const mha_kernels *kernels, size_t rows, size_t heads, size_t width)
{
    if (heads == 1 || width % kernels->lanes > 0 || width < MIN_APART * kernels->lanes)
        return reserve_side_by_side(layout, kernels, rows, heads, width);
    return (matrix){.offset = mha_reserve(layout, rows, heads * width, kernels->size), .row_stride = width,
                    .head_stride = rows * width, .head_width = width};
}

/* Describes rows in the workspace. Item n begins at row n * length. If length is 0, rows are numbered through all
 * items. */
static void set_rows(const pass *f, const matrix *m, size_t length, mha_rows *rows)
{
    rows->data = at_offset(f, m->offset);
    rows->stride_n = (ptrdiff_t)(length * m->row_stride);
    rows->stride_h = (ptrdiff_t)m->head_stride;
    rows->stride_l = (ptrdiff_t)m->row_stride;
    rows->items = NULL;
}

static void describe_attention(const pass *f, mha_attention *a)
{
    const mha_call *call = f->call;
    const mha_widths *w = &f->layer->widths;
    const offsets *at = &f->at;
    a->kernels = f->layer->kernels;
    a->N = call->N;
    a->L = call->L;
    a->H = w->H;
    a->Hkv = w->Hkv;
    a->D = w->D;
    a->Dv = w->Dv;
    a->first_item = f->first_item;
    a->scale = 1 / sqrt((double)w->D);
    set_rows(f, &at->q, call->L, &a->q);
    set_rows(f, &at->context, call->L, &a->context);
    set_rows(f, &at->k, 0, &a->k);
    set_rows(f, &at->v, 0, &a->v);
    set_rows(f, &at->extra_k, 0, &a->extra_k);
    set_rows(f, &at->extra_v, 0, &a->extra_v);
    a->live = &f->live;
    a->rules = &f->rules;
    a->empty_row = call->empty_row;
    a->dropout_p = call->dropout_p;
    if (call->dropout_p > 0)
        mha_dropout_key(call->dropout_seed, call->dropout_call, a->dropout_key);
    a->wanted = call->wanted;
    a->probabilities = call->attn_weights;
    a->maximum = at_offset(f, at->maximum);
    a->sum = at_offset(f, at->sum);
    a->team = f->team;
    mha_split_queries(a);
}

/* Completes the plan of few_queries.c with the addresses that it shares with the other steps. */
static mha_few_queries describe_few_queries(const pass *f)
{
    mha_few_queries few = f->few;
    few.workspace = f->workspace;
    few.q = at_offset(f, f->at.q.offset);
    few.q_stride = f->at.q.row_stride;
    few.q_head = f->at.q.head_stride;
    few.context = at_offset(f, f->at.context.offset);
    few.context_stride = f->at.context.row_stride;
    return few;
}

/* Plans the workspace. The layout must be empty. */
static void plan_workspace(pass *f, mha_layout *layout)
{
    const mha_call *call = f->call;
    const mha_widths *w = &f->layer->widths;
    const mha_kernels *kernels = f->layer->kernels;
    const size_t size = kernels->size, queries = call->N * call->L, keys = mha_live_rows(&f->live);
    offsets *at = &f->at;
    f->few = (mha_few_queries){.layer = f->layer, .call = call, .live = &f->live, .rules = &f->rules};
    at->q = reserve_heads(layout, kernels, queries, w->H, w->D);
    at->k = reserve_heads(layout, kernels, keys, w->Hkv, w->D);
    at->v = reserve_heads(layout, kernels, keys, w->Hkv, w->Dv);
    at->context = reserve_side_by_side(layout, kernels, queries, w->H, w->Dv);
    at->extra_k = reserve_side_by_side(layout, kernels, f->live.extra, w->Hkv, w->D);
    at->extra_v = reserve_side_by_side(layout, kernels, f->live.extra, w->Hkv, w->Dv);
    /* the two tables are not needed at the same time */
    at->q_addresses = at->context_addresses = mha_reserve(layout, queries, 1, sizeof(char *));
    at->k_addresses = mha_reserve(layout, keys, 1, sizeof(char *));
    at->v_addresses = same_input(&call->key, &call->value) ? at->k_addresses
                                                           : mha_reserve(layout, keys, 1, sizeof(char *));
    if (layout->too_large)
        return;
    mha_projection projections[MHA_TARGETS], output;
    mha_attention attention;
    describe_attention(f, &attention);
    const size_t inputs = describe_inputs(f, projections);
    describe_output(f, &output);
    const size_t statistics = call->wanted ? mha_attention_statistics(&attention) : 0;
    at->maximum = mha_reserve(layout, statistics, 1, size);
    at->sum = mha_reserve(layout, statistics, 1, size);
    mha_few_queries_plan(&f->few, layout);
    f->team.scratch_bytes = mha_larger(mha_larger(mha_attention_scratch(&attention), mha_few_queries_scratch(&f->few)),
                               mha_larger(mha_projection_scratch(kernels, projections, inputs),
                                      mha_projection_scratch(kernels, &output, 1)));
    at->scratch = mha_reserve(layout, f->team.threads, f->team.scratch_bytes, 1);
}

/* ---- The pass ---- */

/* Copies the context without the padding that its rows have in the workspace. */
static void copy_context(const pass *f)
{
    const size_t size = f->layer->kernels->size, bytes = f->layer->widths.H * f->layer->widths.Dv * size;
    for (size_t row = 0; row < f->call->N * f->call->L; row++)
        memcpy((char *)f->call->context + row * bytes,
               f->workspace + f->at.context.offset + row * f->at.context.row_stride * size, bytes);
}

/* Runs all steps. *given_up counts the items of few_queries.c that turned out to need their keys projected. If there
 * are any, nothing has been written to the output. */
static mha_status run_steps(pass *f, size_t *given_up)
{
    const mha_call *call = f->call;
    const mha_kernels *kernels = f->layer->kernels;
    mha_projection projections[MHA_TARGETS];
    f->team.scratch = f->workspace + f->at.scratch;
    list_input_rows(f);
    write_extra_keys(f);
    if (call->static_k.data)
        copy_projected(f, &call->static_k, f->layer->widths.D, &f->at.k);
    if (call->static_v.data)
        copy_projected(f, &call->static_v, f->layer->widths.Dv, &f->at.v);

    const size_t inputs = describe_inputs(f, projections);
    mha_status status = mha_project(kernels, projections, inputs, &f->team);
    if (status != MHA_OK)
        return status;

    mha_attention attention;
    describe_attention(f, &attention);
    status = mha_attend(&attention);
    if (status != MHA_OK)
        return status;
    const mha_few_queries few = describe_few_queries(f);
    status = mha_few_queries_attend(&few, &f->team, given_up);
    if (status != MHA_OK || *given_up > 0)
        return status;

    if (call->context)
        copy_context(f);
    if (!call->output)
        return MHA_OK;
    list_context_rows(f);
    describe_output(f, projections);
    return mha_project(kernels, projections, 1, &f->team);
}

/* Reads the masks, and decides which items few_queries.c computes. */
static mha_status read_masks(const mha_layer *layer, const mha_call *call, mha_live_keys *live, mha_rules *rules)
{
    size_t positions;
    if (__builtin_mul_overflow(call->N, call->L, &positions) || __builtin_mul_overflow(call->N, call->S, &positions))
        return MHA_TOO_LARGE;
    const mha_status status = mha_read_masks(call, mha_extra_keys(layer, call), live, rules);
    const bool can = mha_few_queries_can(layer, call);
    for (size_t n = 0; status == MHA_OK && n < call->N; n++)
        live->is_few[n] = can && (call->is_few ? call->is_few[n]
                                               : mha_few_queries_pays(layer, call, mha_live_count(live, n)));
    return status;
}

/* Runs all items together, step by step. */
static mha_status run_at_once(pass *f)
{
    mha_status status;
    size_t given_up;
    do {
        mha_layout layout = {0};
        given_up = 0;
        mha_number_rows(&f->live);
        f->workspace = NULL;
        plan_workspace(f, &layout);
        status = mha_take_workspace(&layout, &f->workspace);
        if (status == MHA_OK)
            status = run_steps(f, &given_up);
        mha_give_workspace(f->workspace);
    } while (status == MHA_OK && given_up > 0);
    return status;
}

/* ---- Chunks ----
 *
 * Chunks of items go through all steps, each in one thread. What a step hands on to the next is then still in the
 * second-level cache. The threads do not wait for each other between steps. The workspace holds a chunk for every
 * thread, however large the batch is. */

typedef struct {
    const pass *all;
    size_t chunks;
    char *workspaces; /* of all threads */
    size_t bytes;
} chunk_tasks;

/* The least number of chunks with which threads end at about the same time, if there are to be `chunks`. */
static size_t min_chunks(const pass *f, size_t chunks)
{
    const size_t N = f->call->N, threads = f->team.threads;
    if (threads == 1)
        return 2;
    if (f->live.index)
        return 2 * CHUNKS_PER_THREAD * threads;
    const size_t busiest = chunks / threads * (N / chunks) + mha_divide_up(N % chunks, threads);
    const size_t rows = mha_divide_up(N, chunks) * mha_larger(f->call->L, f->call->S);
    return rows <= MAX_SMALL_CHUNK_ROWS && busiest * threads - N <= N / MAX_EXCESS ? threads
                                                                                   : CHUNKS_PER_THREAD * threads;
}

/* The number of chunks in which to run a call. 1: all items at once. A chunk writes its output while others read their
 * inputs, so that an output that overlaps an input rules chunks out. */
static size_t choose_chunks(const pass *f)
{
    const mha_call *call = f->call;
    const size_t items = mha_divide_up(MIN_CHUNK_ROWS, mha_larger(call->L, call->S)), threads = f->team.threads;
    const size_t chunks = call->N / items / threads * threads;
    if (chunks == 0 || chunks < min_chunks(f, chunks) || (call->output && !call->output_is_apart))
        return 1;
    for (size_t n = 0; n < call->N; n++)
        if (f->live.is_few[n])
            return 1;
    return chunks;
}

/* Describes chunk i. `call` is filled in as well, and must live as long as the result. */
static pass describe_chunk(const chunk_tasks *j, size_t i, mha_call *call)
{
    const pass *all = j->all;
    const mha_widths *w = &all->layer->widths;
    const size_t first = mha_first_of_part(all->call->N, j->chunks, i);
    const size_t count = mha_first_of_part(all->call->N, j->chunks, i + 1) - first;
    const size_t size = all->layer->kernels->size, L = all->call->L, keys = all->call->S + all->live.extra;
    const size_t heads = all->call->wanted == MHA_WANT_AVERAGES ? 1 : w->H;
    const ptrdiff_t n = (ptrdiff_t)first;
    *call = *all->call;
    call->N = count;
    call->query.data = (const char *)call->query.data + n * call->query.stride_n;
    call->key.data = (const char *)call->key.data + n * call->key.stride_n;
    call->value.data = (const char *)call->value.data + n * call->value.stride_n;
    if (call->static_k.data)
        call->static_k.data = (const char *)call->static_k.data + n * call->static_k.stride_n;
    if (call->static_v.data)
        call->static_v.data = (const char *)call->static_v.data + n * call->static_v.stride_n;
    if (call->output)
        call->output = (char *)call->output + first * (call->output_batch_first ? L : 1) * w->Eo * size;
    if (call->attn_weights)
        call->attn_weights = (char *)call->attn_weights + first * heads * L * keys * size;
    if (call->context)
        call->context = (char *)call->context + first * L * w->H * w->Dv * size;
    return (pass){.layer = all->layer, .call = call, .team = {.threads = 1, .in_task = true}, .first_item = first,
                  .items_in_all = all->call->N,
                  .live = mha_live_keys_of(&all->live, first, count), .rules = mha_rules_of(&all->rules, first)};
}

static void run_chunk(void *context, size_t task, size_t worker)
{
    const chunk_tasks *j = context;
    mha_call call;
    mha_layout layout = {0};
    size_t given_up;
    pass f = describe_chunk(j, task, &call);
    plan_workspace(&f, &layout);
    f.workspace = j->workspaces + worker * j->bytes;
    (void)run_steps(&f, &given_up); /* a chunk is stopped only together with the whole loop */
}

static mha_status run_in_chunks(pass *f, size_t chunks)
{
    chunk_tasks j = {.all = f, .chunks = chunks};
    mha_layout all = {0};
    mha_number_rows(&f->live);
    for (size_t i = 0; i < chunks; i++) {
        mha_call call;
        mha_layout layout = {0};
        pass chunk = describe_chunk(&j, i, &call);
        plan_workspace(&chunk, &layout);
        j.bytes = mha_larger(j.bytes, layout.bytes);
        all.too_large |= layout.too_large;
    }
    mha_reserve(&all, f->team.threads, j.bytes, 1);
    mha_status status = mha_take_workspace(&all, &j.workspaces);
    if (status == MHA_OK)
        status = mha_parallel_for(&f->team, chunks, run_chunk, &j);
    mha_give_workspace(j.workspaces);
    return status;
}

mha_status mha_forward(const mha_layer *layer, const mha_call *call)
{
    pass f = {.layer = layer, .call = call, .items_in_all = call->N,
              .team = {.threads = call->threads, .stop = call->stop}};
    if (call->N == 0 || call->L == 0)
        return MHA_OK; /* there are no results */
    mha_status status = read_masks(layer, call, &f.live, &f.rules);
    if (status == MHA_OK) {
        const size_t chunks = choose_chunks(&f);
        status = chunks > 1 ? run_in_chunks(&f, chunks) : run_at_once(&f);
    }
    mha_live_keys_release(&f.live);
    return status;
}

/* ---- Parts of the pass, for mha_c.explain ---- */

mha_status mha_choose_paths(const mha_layer *layer, const mha_call *call, bool *is_few)
{
    mha_live_keys live = {0};
    mha_rules rules;
    const mha_status status = read_masks(layer, call, &live, &rules);
    if (status == MHA_OK)
        memcpy(is_few, live.is_few, call->N * sizeof *is_few);
    mha_live_keys_release(&live);
    return status;
}

mha_status mha_project_input(const mha_input_projection *input)
{
    const mha_layer *layer = input->layer;
    const mha_panels *panels = input->input == MHA_QUERY ? &layer->q : input->input == MHA_KEY ? &layer->k : &layer->v;
    mha_projection projection = {.stride_e = input->x.stride_e, .targets = 1,
                                 .target = {{.panels = panels, .y = input->y, .stride = panels->split.width}}};
    mha_layout layout = {0};
    char *workspace = NULL;
    if (__builtin_mul_overflow(input->N, input->length, &projection.rows))
        return MHA_TOO_LARGE;
    const size_t row = mha_reserve(&layout, projection.rows, 1, sizeof(char *));
    mha_team team = {.threads = input->threads, .stop = input->stop,
                     .scratch_bytes = mha_projection_scratch(layer->kernels, &projection, 1)};
    const size_t scratch = mha_reserve(&layout, team.threads, team.scratch_bytes, 1);
    mha_status status = mha_take_workspace(&layout, &workspace);
    if (status == MHA_OK) {
        list_rows(&input->x, input->N, input->length, NULL, (const char **)(void *)(workspace + row));
        projection.row_address = (const char *const *)(void *)(workspace + row);
        team.scratch = workspace + scratch;
        status = mha_project(layer->kernels, &projection, 1, &team);
    }
    mha_give_workspace(workspace);
    return status;
}
