/* SPDX-License-Identifier: Apache-2.0
 *
 * few_queries.c - moves queries to the side of the keys' inputs, attends to the inputs, and moves the sums to the
 * values' side.
 *
 *      absorb           t = Wk_h^T q_h for every lane, then as panels            task: item, head
 *      attend           softmax and sums over one segment of keys                task: item, panel, segment
 *      merge            the segments of a panel, in order                        task: item, panel
 *      emit             context = Wv_h y + bv                                    task: item, head
 *      probabilities    from scores that are computed again                      task: item, query, segment
 *
 * Owns: the order of additions along the keys: blocks as in attention.c, then segments of SEGMENT_BLOCKS blocks.
 */
#include "few_queries.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "projection.h"
#include "threads.h"

enum {
    SEGMENT_BLOCKS = 8, /* key blocks; with segments, one query of one item keeps several threads busy */
    MIN_FEATURES = MHA_MAX_VECTOR_LANES, /* of keys and values: rows of Wk are read in whole vectors */
    MIN_GAIN = 2,                        /* the path is chosen if it takes less than half of the operations */
};

bool mha_few_queries_can(const mha_layer *layer, const mha_call *call)
{
    /* Extra and static keys have no input. Dropout is for training. Scores lack a constant here, so they cannot be
     * returned. */
    return layer->widths.Ek >= MIN_FEATURES && layer->widths.Ev >= MIN_FEATURES &&
           mha_extra_keys(layer, call) == 0 && !call->static_k.data && !call->static_v.data &&
           !(call->dropout_p > 0) && call->L > 0 && call->wanted != MHA_WANT_SCORES;
}

bool mha_few_queries_pays(const mha_layer *layer, const mha_call *call, size_t live_keys)
{
    const mha_widths *w = &layer->widths;
    const double L = (double)call->L, S = (double)live_keys, H = (double)w->H, Hkv = (double)w->Hkv;
    const double D = (double)w->D, Dv = (double)w->Dv, Ek = (double)w->Ek, Ev = (double)w->Ev;
    const double this_way = L * H * (S * (Ek + Ev) + D * Ek + Dv * Ev);
    const double other_way = S * Hkv * (D * Ek + Dv * Ev) + L * S * H * (D + Dv);
    return (double)MIN_GAIN * this_way < other_way;
}

/* ---- The plan ---- */

static size_t lanes_of(const mha_few_queries *f)
{
    return f->call->L * f->layer->widths.H;
}

static mha_split split_of(const mha_few_queries *f)
{
    return mha_split_width(f->layer->kernels, lanes_of(f));
}

static size_t padded_lanes(const mha_few_queries *f)
{
    return split_of(f).vectors * f->layer->kernels->lanes;
}

void mha_few_queries_plan(mha_few_queries *f, mha_layout *layout)
{
    const mha_widths *w = &f->layer->widths;
    const mha_kernels *kernels = f->layer->kernels;
    const size_t size = kernels->size;
    f->items = f->segments = 0;
    for (size_t n = 0; n < f->call->N; n++) {
        if (!f->live->is_few[n])
            continue;
        f->items++;
        const size_t segments = mha_divide_up(mha_key_blocks(f->live, n), SEGMENT_BLOCKS);
        f->segments = segments > f->segments ? segments : f->segments;
    }
    if (f->items == 0)
        return;
    const size_t padded = padded_lanes(f), rows = f->items * lanes_of(f);
    const size_t widest = kernels->vectors * kernels->lanes; /* statistics are read a whole panel at a time */
    f->t_stride = mha_row_stride(w->Ek, kernels->lanes, size);
    f->y_stride = mha_row_stride(w->Ev, kernels->lanes, size);
    f->item_numbers = mha_reserve(layout, f->items, 1, sizeof(size_t));
    f->t = mha_reserve(layout, rows, f->t_stride, size);
    f->t_panels = mha_reserve(layout, f->items * padded, w->Ek, size);
    const size_t by_head = mha_split_width(kernels, w->H).vectors * kernels->lanes;
    f->query_panels = mha_reserve(layout, f->call->wanted ? f->items * f->call->L * by_head : 0, w->Ek, size);
    f->sums = mha_reserve(layout, f->items * f->segments * padded, w->Ev, size);
    f->maximum = mha_reserve(layout, f->items * f->segments * padded + widest, 1, size);
    f->sum = mha_reserve(layout, f->items * f->segments * padded + widest, 1, size);
    f->y = mha_reserve(layout, rows, f->y_stride, size);
    f->bias_factor = mha_reserve(layout, f->items * padded, 1, size);
    f->is_given_up = mha_reserve(layout, f->call->N, 1, sizeof(atomic_bool));
}

/* A thread's scratch: scores of a panel, a slice of a block's inputs, and a strip or the probabilities of all heads of
 * a query. */
typedef struct {
    char *scores, *bias, *factor, *slice, *rows;
} scratch_pieces;

static size_t slice_stride(const mha_kernels *kernels)
{
    return mha_row_stride(MHA_CHAIN, kernels->lanes, kernels->size);
}

static scratch_pieces take_scratch(const mha_few_queries *f, char *base, mha_layout *layout)
{
    const mha_kernels *kernels = f->layer->kernels;
    const size_t P = kernels->vectors * kernels->lanes, H = f->layer->widths.H, size = kernels->size;
    const size_t scores = mha_reserve(layout, MHA_BLOCK_KEYS, P, size);
    const size_t bias = mha_reserve(layout, MHA_BLOCK_KEYS, P, size), factor = mha_reserve(layout, 1, P, size);
    const size_t slice = mha_reserve(layout, MHA_BLOCK_KEYS, slice_stride(kernels), size);
    const size_t max_rows = H > f->call->L ? H : f->call->L;
    const size_t rows = mha_reserve(layout, max_rows, MHA_BLOCK_KEYS > P ? MHA_BLOCK_KEYS : P, size);
    return base ? (scratch_pieces){base + scores, base + bias, base + factor, base + slice, base + rows}
                : (scratch_pieces){0};
}

size_t mha_few_queries_scratch(const mha_few_queries *f)
{
    mha_layout layout = {0};
    if (f->items)
        take_scratch(f, NULL, &layout);
    return layout.bytes;
}

/* ---- Places in the workspace ---- */

typedef struct {
    const mha_few_queries *f;
    mha_split split;   /* of the lanes of an item */
    mha_split by_head; /* of the heads of one query */
    char *scratch;
    size_t scratch_bytes;
} few_tasks;

static scratch_pieces scratch_of(const few_tasks *j, size_t worker)
{
    mha_layout layout = {0};
    return take_scratch(j->f, j->scratch + worker * j->scratch_bytes, &layout);
}

static size_t number_of_item(const mha_few_queries *f, size_t i)
{
    return ((const size_t *)(const void *)(f->workspace + f->item_numbers))[i];
}

static char *numbers_at(const mha_few_queries *f, size_t offset, size_t index)
{
    return f->workspace + offset + index * f->layer->kernels->size;
}

static atomic_bool *is_given_up(const mha_few_queries *f, size_t n)
{
    return (atomic_bool *)(void *)(f->workspace + f->is_given_up) + n;
}

static void give_up_unless_finite(const mha_few_queries *f, size_t n, const char *numbers, size_t count)
{
    if (!f->layer->kernels->is_finite(numbers, count))
        atomic_store_explicit(is_given_up(f, n), true, memory_order_relaxed);
}

/* ---- Keys' inputs ---- */

/* Copies `features` features of the block's inputs from feature `first` on. The rows of the copy are slice_stride()
 * numbers apart. */
static void copy_inputs(const mha_few_queries *f, const mha_array *x, size_t n, const mha_key_block *block,
                        size_t first, size_t features, char *slice)
{
    const mha_kernels *kernels = f->layer->kernels;
    const size_t bytes = slice_stride(kernels) * kernels->size;
    const char *item = (const char *)x->data + (ptrdiff_t)n * x->stride_n + (ptrdiff_t)first * x->stride_e;
    for (size_t i = 0; i < block->keys; i++)
        mha_copy_row(item + (ptrdiff_t)mha_key_number(block, i) * x->stride_l, x->stride_e, features, kernels->size,
                     slice + i * bytes);
}

/* ---- absorb ---- */

/* Computes some features of the rows of t for one head: q_h times rows of Wk, which are read in place. The last vector
 * ends with the last feature, so that nothing is read beyond the matrix. The features that it shares with the vector
 * before are computed twice, to the same bits. */
static void absorb_window(const mha_few_queries *f, size_t i, size_t h, size_t first, size_t vectors)
{
    const mha_layer *layer = f->layer;
    const mha_widths *w = &layer->widths;
    const size_t size = layer->kernels->size, hkv = h / (w->H / w->Hkv), n = number_of_item(f, i);
    const char *q = f->q + (n * f->call->L * f->q_stride + h * f->q_head) * size;
    const char *Wk = (const char *)layer->k_weight + (hkv * w->D * w->Ek + first) * size;
    char *t = numbers_at(f, f->t, (i * lanes_of(f) + h) * f->t_stride + first);
    mha_product product = {.rows = f->call->L, .vectors = vectors, .a_row = (ptrdiff_t)f->q_stride, .a_k = 1,
                           .b_k = w->Ek, .addend_row = w->H * f->t_stride, .c = t, .c_row = w->H * f->t_stride};
    for (size_t d = 0; d < w->D; d += MHA_CHAIN) {
        product.depth = mha_smaller(w->D - d, MHA_CHAIN);
        product.a = q + d * size;
        product.b = Wk + d * w->Ek * size;
        product.addend = d ? t : NULL;
        layer->kernels->product(&product);
    }
}

/* Checks that the constants q_h bk_h / sqrt(D) of a head's rows are finite. No score contains them, so a check of the
 * scores does not notice them. bk_h fills one lane of a panel. */
static void check_constants(const mha_few_queries *f, size_t i, size_t h, const scratch_pieces *s)
{
    const mha_layer *layer = f->layer;
    const mha_widths *w = &layer->widths;
    const mha_kernels *kernels = layer->kernels;
    const size_t size = kernels->size, P = kernels->lanes, n = number_of_item(f, i);
    const char *q = f->q + (n * f->call->L * f->q_stride + h * f->q_head) * size;
    const char *bk = layer->k.bias + h / (w->H / w->Hkv) * w->D * size;
    mha_product product = {.rows = f->call->L, .vectors = 1, .a_row = (ptrdiff_t)f->q_stride, .a_k = 1, .b = s->slice,
                           .b_k = P, .addend_row = P, .c = s->rows, .c_row = P};
    for (size_t d = 0; d < w->D; d += MHA_CHAIN) {
        product.depth = mha_smaller(w->D - d, MHA_CHAIN);
        kernels->pack_panel(bk + d * size, 0, 1, product.depth, 1 / sqrt((double)w->D), s->slice, 1);
        product.a = q + d * size;
        product.addend = d ? s->rows : NULL;
        kernels->product(&product);
    }
    give_up_unless_finite(f, n, s->rows, f->call->L * P);
}

static void absorb_task(void *context, size_t task, size_t worker)
{
    const few_tasks *j = context;
    const mha_kernels *kernels = j->f->layer->kernels;
    const size_t H = j->f->layer->widths.H, i = task / H, h = task % H, Ek = j->f->layer->widths.Ek;
    const scratch_pieces s = scratch_of(j, worker);
    size_t e = 0;
    if (j->f->layer->k.bias)
        check_constants(j->f, i, h, &s);
    while (Ek - e >= kernels->lanes) {
        const size_t vectors = mha_smaller((Ek - e) / kernels->lanes, kernels->vectors);
        absorb_window(j->f, i, h, e, vectors);
        e += vectors * kernels->lanes;
    }
    if (e < Ek)
        absorb_window(j->f, i, h, Ek - kernels->lanes, 1);
}

static void pack_task(void *context, size_t task, size_t worker)
{
    const few_tasks *j = context;
    const mha_few_queries *f = j->f;
    const size_t Ek = f->layer->widths.Ek, i = task / j->split.panels;
    const mha_panel panel = mha_panel_at(&j->split, task % j->split.panels);
    (void)worker;
    f->layer->kernels->pack_panel(numbers_at(f, f->t, (i * lanes_of(f) + panel.first) * f->t_stride), f->t_stride,
                                  panel.count, Ek, 1 / sqrt((double)f->layer->widths.D),
                                  numbers_at(f, f->t_panels, (i * padded_lanes(f) + panel.first) * Ek),
                                  panel.vectors);
}

/* ---- attend ---- */

/* Computes the masked scores of a panel for the visible keys of a block. `first` is the number of lane 0 in the item. A
 * visible score that is not finite gives the item up. */
static mha_visible score_inputs(const mha_few_queries *f, size_t n, size_t first, mha_panel panel,
                           const mha_key_block *block, const char *queries, const scratch_pieces *s)
{
    const mha_kernels *kernels = f->layer->kernels;
    const size_t P = panel.vectors * kernels->lanes, Ek = f->layer->widths.Ek;
    const mha_lanes lanes = {0, f->layer->widths.H, first, panel.count, panel.vectors};
    const mha_visible visible = mha_apply_rules(kernels, f->rules, n, &lanes, block, s->bias);
    mha_product product = {.rows = visible.keys, .vectors = panel.vectors, .a = s->slice,
                           .a_row = (ptrdiff_t)slice_stride(kernels), .a_k = 1, .b_k = P, .addend_row = P,
                           .c = s->scores, .c_row = P};
    for (size_t e = 0; e < Ek; e += MHA_CHAIN) {
        product.depth = mha_smaller(Ek - e, MHA_CHAIN);
        copy_inputs(f, &f->call->key, n, block, e, product.depth, s->slice);
        product.b = queries + e * P * kernels->size;
        product.addend = e ? s->scores : NULL;
        kernels->product(&product);
    }
    if (!kernels->is_finite(s->scores, visible.keys * P)) { /* before the masks are added, which may be infinite */
        if (visible.is_biased)
            kernels->hide(s->scores, s->bias, visible.keys * P, 0);
        give_up_unless_finite(f, n, s->scores, visible.keys * P);
    }
    if (visible.is_biased)
        kernels->accumulate(s->scores, s->bias, visible.keys * P);
    return visible;
}

/* One panel and one segment of the keys of an item. */
typedef struct {
    size_t n, first_block, end_block;
    mha_panel panel;
    const char *queries;
    char *sums; /* [Ev][P] */
    char *maximum, *sum;
} few_segment;

static void zero_other_numbers(const mha_few_queries *f, const mha_key_block *block, size_t features, char *slice)
{
    const mha_kernels *kernels = f->layer->kernels;
    for (size_t i = 0; i < block->keys; i++)
        for (size_t e = 0; e < features; e++) {
            char *number = slice + (i * slice_stride(kernels) + e) * kernels->size;
            if (!kernels->is_finite(number, 1))
                kernels->fill(number, 1, 0);
        }
}

/* Adds the numbers of a slice that are not finite, where their keys are visible. `bias` is NULL if all are. */
static void add_other_numbers(const mha_few_queries *f, const mha_key_block *block, size_t features, const char *bias,
                              const scratch_pieces *s, mha_panel panel, char *sums)
{
    const mha_kernels *kernels = f->layer->kernels;
    const size_t size = kernels->size, row = panel.vectors * kernels->lanes * size;
    for (size_t i = 0; i < block->keys; i++)
        for (size_t e = 0; e < features; e++) {
            const char *number = s->slice + (i * slice_stride(kernels) + e) * size;
            if (!kernels->is_finite(number, 1))
                kernels->add_visible(sums + e * row, s->scores + i * row, number, bias ? bias + i * row : NULL,
                                     row / size);
        }
}

/* sums = sums * factor + x^T exps, for a slice of features at a time. With care, hidden numbers that are not finite
 * count as 0. */
static void add_values(const mha_few_queries *f, const few_segment *g, const mha_key_block *block, bool is_biased,
                       const scratch_pieces *s, bool is_careful)
{
    const mha_kernels *kernels = f->layer->kernels;
    const size_t P = g->panel.vectors * kernels->lanes, Ev = f->layer->widths.Ev;
    mha_product product = {.depth = block->keys, .vectors = g->panel.vectors, .a = s->slice, .a_row = 1,
                           .a_k = (ptrdiff_t)slice_stride(kernels), .b = s->scores, .b_k = P, .addend_row = P,
                           .factor = s->factor, .c_row = P};
    for (size_t e = 0; e < Ev; e += MHA_CHAIN) {
        char *sums = g->sums + e * P * kernels->size;
        product.rows = mha_smaller(Ev - e, MHA_CHAIN);
        copy_inputs(f, &f->call->value, g->n, block, e, product.rows, s->slice);
        if (is_careful)
            zero_other_numbers(f, block, product.rows, s->slice);
        product.addend = product.c = sums;
        kernels->product(&product);
        if (is_careful) {
            copy_inputs(f, &f->call->value, g->n, block, e, product.rows, s->slice);
            add_other_numbers(f, block, product.rows, is_biased ? s->bias : NULL, s, g->panel, sums);
        }
    }
}

static void attend_segment(const mha_few_queries *f, const few_segment *g, const scratch_pieces *s, bool is_careful)
{
    const mha_kernels *kernels = f->layer->kernels;
    const size_t vectors = g->panel.vectors;
    kernels->softmax_begin(g->maximum, g->sum, vectors);
    kernels->fill(g->sums, f->layer->widths.Ev * vectors * kernels->lanes, 0);
    for (size_t b = g->first_block; b < g->end_block; b++) {
        mha_key_block block;
        mha_key_block_at(f->live, g->n, b, &block);
        const mha_visible visible = score_inputs(f, g->n, g->panel.first, g->panel, &block, g->queries, s);
        block.keys = visible.keys;
        if (block.keys == 0)
            continue;
        kernels->softmax_step(s->scores, block.keys, vectors, s->scores, g->maximum, g->sum, s->factor);
        add_values(f, g, &block, visible.is_biased, s, is_careful);
    }
}

/* As in attention.c, sums that are not finite are computed once more, with care, because the cause may be hidden. */
static void attend_segment_task(void *context, size_t task, size_t worker)
{
    const few_tasks *j = context;
    const mha_few_queries *f = j->f;
    const mha_kernels *kernels = f->layer->kernels;
    const scratch_pieces s = scratch_of(j, worker);
    const size_t padded = padded_lanes(f), segment = task % f->segments, i = task / f->segments / j->split.panels;
    const size_t n = number_of_item(f, i), at_segment = i * f->segments + segment;
    const mha_panel panel = mha_panel_at(&j->split, task / f->segments % j->split.panels);
    const size_t first = segment * SEGMENT_BLOCKS, Ev = f->layer->widths.Ev;
    const few_segment g = {
        .n = n, .panel = panel,
        .first_block = first, .end_block = mha_smaller(first + SEGMENT_BLOCKS, mha_key_blocks(f->live, n)),
        .queries = numbers_at(f, f->t_panels, (i * padded + panel.first) * f->layer->widths.Ek),
        .sums = numbers_at(f, f->sums, (at_segment * padded + panel.first) * Ev),
        .maximum = numbers_at(f, f->maximum, at_segment * padded + panel.first),
        .sum = numbers_at(f, f->sum, at_segment * padded + panel.first),
    };
    attend_segment(f, &g, &s, false);
    if (!kernels->is_finite(g.sums, Ev * panel.vectors * kernels->lanes))
        attend_segment(f, &g, &s, true);
}

/* ---- merge ---- */

static bool is_zero(const mha_kernels *kernels, const char *number)
{
    const char zero[sizeof(double)] = {0};
    return memcmp(number, zero, kernels->size) == 0;
}

static void merge_task(void *context, size_t task, size_t worker)
{
    const few_tasks *j = context;
    const mha_few_queries *f = j->f;
    const mha_kernels *kernels = f->layer->kernels;
    const size_t padded = padded_lanes(f), i = task / j->split.panels, Ev = f->layer->widths.Ev;
    const mha_panel panel = mha_panel_at(&j->split, task % j->split.panels);
    const size_t at = i * f->segments * padded + panel.first; /* segment 0 collects the others */
    char *sums = numbers_at(f, f->sums, at * Ev), *maximum = numbers_at(f, f->maximum, at);
    char *sum = numbers_at(f, f->sum, at);
    for (size_t segment = 1; segment < f->segments; segment++) {
        const size_t at_segment = (i * f->segments + segment) * padded + panel.first;
        kernels->softmax_merge(sums, maximum, sum, numbers_at(f, f->sums, at_segment * Ev),
                               numbers_at(f, f->maximum, at_segment), numbers_at(f, f->sum, at_segment), Ev,
                               panel.vectors);
    }
    char *bias_factor = numbers_at(f, f->bias_factor, i * padded + panel.first);
    for (size_t lane = 0; lane < panel.count; lane++)
        kernels->fill(bias_factor + lane * kernels->size, 1, is_zero(kernels, sum + lane * kernels->size) ? 0 : 1);
    char *inverse = scratch_of(j, worker).factor;
    kernels->softmax_end(sum, inverse, panel.vectors, f->call->empty_row);
    kernels->unpack_panel(sums, panel.vectors, inverse, panel.count, Ev,
                          numbers_at(f, f->y, (i * lanes_of(f) + panel.first) * f->y_stride), f->y_stride);
}

/* ---- emit ---- */

/* Multiplies by one panel of Wv for one head, through a strip. The panel may contain features of other heads. */
static void emit_panel(const mha_few_queries *f, size_t i, size_t h, mha_panel panel, char *strip)
{
    const mha_layer *layer = f->layer;
    const mha_widths *w = &layer->widths;
    const mha_kernels *kernels = layer->kernels;
    const size_t size = kernels->size, P = panel.vectors * kernels->lanes, n = number_of_item(f, i);
    const char *y = numbers_at(f, f->y, (i * lanes_of(f) + h) * f->y_stride);
    const char *Wv = layer->v.data + panel.first * w->Ev * size;
    mha_product product = {.rows = f->call->L, .vectors = panel.vectors, .a_row = (ptrdiff_t)(w->H * f->y_stride),
                           .a_k = 1, .b_k = P, .addend_row = P, .c = strip, .c_row = P};
    for (size_t e = 0; e < w->Ev; e += MHA_CHAIN) {
        product.depth = mha_smaller(w->Ev - e, MHA_CHAIN);
        product.a = y + e * size;
        product.b = Wv + e * P * size;
        product.addend = e ? strip : NULL;
        kernels->product(&product);
    }
    if (layer->v.bias) {
        product.depth = 1;
        product.a = numbers_at(f, f->bias_factor, i * padded_lanes(f) + h);
        product.a_row = (ptrdiff_t)w->H;
        product.b = layer->v.bias + panel.first * size;
        product.addend = strip;
        kernels->product(&product);
    }
    const size_t hkv = h / (w->H / w->Hkv), head = hkv * w->Dv;
    const size_t from = head > panel.first ? head : panel.first;
    const size_t to = mha_smaller(head + w->Dv, panel.first + panel.count);
    for (size_t l = 0; l < f->call->L; l++)
        memcpy(f->context + ((n * f->call->L + l) * f->context_stride + h * w->Dv + from - head) * size,
               strip + (l * P + from - panel.first) * size, (to - from) * size);
}

/* Checks that the context of a head is finite. If a number in values, Wv or bv is not finite, nor is the context. A
 * query that sees no key may have NaN on purpose. */
static void check_context(const mha_few_queries *f, size_t i, size_t h)
{
    const mha_widths *w = &f->layer->widths;
    const mha_kernels *kernels = f->layer->kernels;
    const size_t n = number_of_item(f, i);
    for (size_t l = 0; l < f->call->L; l++) {
        const bool is_empty = is_zero(kernels, numbers_at(f, f->bias_factor, i * padded_lanes(f) + l * w->H + h));
        if (!is_empty || f->call->empty_row != MHA_EMPTY_ROW_NAN)
            give_up_unless_finite(f, n, f->context + ((n * f->call->L + l) * f->context_stride + h * w->Dv) *
                                                         kernels->size, w->Dv);
    }
}

static void emit_task(void *context, size_t task, size_t worker)
{
    const few_tasks *j = context;
    const mha_few_queries *f = j->f;
    const mha_widths *w = &f->layer->widths;
    const size_t i = task / w->H, h = task % w->H, head = h / (w->H / w->Hkv) * w->Dv;
    const mha_split *split = &f->layer->v.split;
    for (size_t p = 0; p < split->panels; p++) {
        const mha_panel panel = mha_panel_at(split, p);
        if (panel.first < head + w->Dv && head < panel.first + panel.count)
            emit_panel(f, i, h, panel, scratch_of(j, worker).rows);
    }
    check_context(f, i, h);
}

/* ---- probabilities ---- */

/* Packs the heads of one query as panels of their own, because averages are sums over these heads. */
static void pack_query_task(void *context, size_t task, size_t worker)
{
    const few_tasks *j = context;
    const mha_few_queries *f = j->f;
    const mha_widths *w = &f->layer->widths;
    const size_t padded = j->by_head.vectors * j->by_head.lanes;
    (void)worker;
    for (size_t p = 0; p < j->by_head.panels; p++) {
        const mha_panel panel = mha_panel_at(&j->by_head, p);
        f->layer->kernels->pack_panel(numbers_at(f, f->t, (task * w->H + panel.first) * f->t_stride), f->t_stride,
                                      panel.count, w->Ek, 1 / sqrt((double)w->D),
                                      numbers_at(f, f->query_panels, (task * padded + panel.first) * w->Ek),
                                      panel.vectors);
    }
}

typedef struct {
    size_t n, l;
    const char *panels;            /* of the query's heads */
    const char *maximum, *sum;     /* of head 0 */
    char *out;         /* the query's row of probabilities for head 0 */
    size_t out_stride; /* bytes to the row of the next head; not used for averages */
} query_rows;

static query_rows describe_query_rows(const few_tasks *j, size_t query)
{
    const mha_few_queries *f = j->f;
    const mha_call *call = f->call;
    const mha_widths *w = &f->layer->widths;
    const size_t i = query / call->L, l = query % call->L, n = number_of_item(f, i), padded = padded_lanes(f);
    const size_t heads = call->wanted == MHA_WANT_PROBABILITIES ? w->H : 1;
    const size_t row_bytes = call->S * f->layer->kernels->size;
    return (query_rows){
        .n = n, .l = l,
        .panels = numbers_at(f, f->query_panels, query * j->by_head.vectors * j->by_head.lanes * w->Ek),
        .maximum = numbers_at(f, f->maximum, i * f->segments * padded + l * w->H),
        .sum = numbers_at(f, f->sum, i * f->segments * padded + l * w->H),
        .out = (char *)call->attn_weights + (n * heads * call->L + l) * row_bytes,
        .out_stride = call->L * row_bytes,
    };
}

/* rows[h][key]: the probabilities of all heads of one query for a block, or their average in rows[0]. Keys that are
 * hidden from every head get 0, or NaN if the query sees no key. */
static void probabilities_of_block(const few_tasks *j, const query_rows *w, const mha_key_block *block, bool is_hidden,
                                   const scratch_pieces *s)
{
    const mha_few_queries *f = j->f;
    const mha_kernels *kernels = f->layer->kernels;
    const size_t size = kernels->size, H = f->layer->widths.H;
    const bool is_averaged = f->call->wanted == MHA_WANT_AVERAGES;
    for (size_t p = 0; p < j->by_head.panels; p++) {
        const mha_panel panel = mha_panel_at(&j->by_head, p);
        const size_t P = panel.vectors * kernels->lanes;
        const char *queries = w->panels + panel.first * f->layer->widths.Ek * size;
        const size_t seen = is_hidden ? 0 : score_inputs(f, w->n, w->l * H + panel.first, panel, block, queries, s).keys;
        kernels->fill(s->scores + seen * P * size, (block->keys - seen) * P, -INFINITY);
        kernels->softmax_probabilities(s->scores, block->keys, panel.vectors, w->maximum + panel.first * size,
                                       w->sum + panel.first * size);
        kernels->fill(s->factor, P, is_averaged ? 1 / (double)H : 1);
        kernels->unpack_panel(s->scores, panel.vectors, s->factor, panel.count, block->keys,
                              s->rows + panel.first * MHA_BLOCK_KEYS * size, MHA_BLOCK_KEYS);
    }
    for (size_t h = 1; is_averaged && h < H; h++)
        kernels->accumulate(s->rows, s->rows + h * MHA_BLOCK_KEYS * size, MHA_BLOCK_KEYS);
}

/* Copies what probabilities_of_block() computed for key i of its block to the column of key s. */
static void write_probability(const few_tasks *j, const query_rows *w, size_t i, size_t s_key, const scratch_pieces *s)
{
    const mha_few_queries *f = j->f;
    const size_t size = f->layer->kernels->size;
    const size_t heads = f->call->wanted == MHA_WANT_PROBABILITIES ? f->layer->widths.H : 1;
    for (size_t h = 0; h < heads; h++)
        memcpy(w->out + h * w->out_stride + s_key * size, s->rows + (h * MHA_BLOCK_KEYS + i) * size, size);
}

static void probabilities_task(void *context, size_t task, size_t worker)
{
    const few_tasks *j = context;
    const mha_live_keys *live = j->f->live;
    const scratch_pieces s = scratch_of(j, worker);
    const query_rows w = describe_query_rows(j, task / j->f->segments);
    const size_t segment = task % j->f->segments, first = segment * SEGMENT_BLOCKS;
    const size_t end = mha_smaller(first + SEGMENT_BLOCKS, mha_key_blocks(live, w.n));
    for (size_t b = first; b < end; b++) {
        mha_key_block block;
        mha_key_block_at(live, w.n, b, &block);
        probabilities_of_block(j, &w, &block, false, &s);
        for (size_t i = 0; i < block.keys; i++)
            write_probability(j, &w, i, mha_key_number(&block, i), &s);
    }
    if (segment == 0 && live->index) {
        const mha_key_block one = {.keys = 1};
        probabilities_of_block(j, &w, &one, true, &s);
        for (size_t k = mha_next_removed(live, w.n, 0); k < live->S; k = mha_next_removed(live, w.n, k + 1))
            write_probability(j, &w, 0, k, &s);
    }
}

/* ---- All stages ---- */

static mha_status run_stage(const few_tasks *j, size_t tasks, mha_task task)
{
    return mha_parallel_for(j->f->call->threads, tasks, task, (void *)j, j->f->call->stop);
}

static void number_items(const mha_few_queries *f)
{
    size_t *number = (size_t *)(void *)(f->workspace + f->item_numbers);
    for (size_t n = 0; n < f->call->N; n++)
        if (f->live->is_few[n])
            *number++ = n;
}

static size_t take_out_given_up(const mha_few_queries *f)
{
    size_t count = 0;
    for (size_t n = 0; n < f->call->N; n++)
        if (atomic_load_explicit(is_given_up(f, n), memory_order_relaxed)) {
            f->live->is_few[n] = false;
            count++;
        }
    return count;
}

mha_status mha_few_queries_attend(const mha_few_queries *f, char *scratch, size_t scratch_bytes, size_t *given_up)
{
    *given_up = 0;
    if (f->items == 0)
        return MHA_OK;
    const size_t H = f->layer->widths.H;
    const few_tasks j = {.f = f, .split = split_of(f), .by_head = mha_split_width(f->layer->kernels, H),
                         .scratch = scratch, .scratch_bytes = scratch_bytes};
    const size_t panels = f->items * j.split.panels, queries = f->items * f->call->L;
    const struct {
        size_t tasks;
        mha_task task;
    } stages[] = {
        {f->items * H, absorb_task},
        {panels, pack_task},
        {panels * f->segments, attend_segment_task},
        {panels, merge_task},
        {f->items * H, emit_task},
        /* for the probabilities: */
        {queries, pack_query_task},
        {queries * f->segments, probabilities_task},
    };
    enum { STAGES = sizeof stages / sizeof *stages, TO_CONTEXT = STAGES - 2 };
    mha_status status = MHA_OK;
    number_items(f);
    for (size_t n = 0; n < f->call->N; n++)
        atomic_init(is_given_up(f, n), false);
    for (size_t i = 0; i < TO_CONTEXT && status == MHA_OK; i++)
        status = run_stage(&j, stages[i].tasks, stages[i].task);
    if (status == MHA_OK)
        *given_up = take_out_given_up(f);
    for (size_t i = TO_CONTEXT; i < STAGES && status == MHA_OK && *given_up == 0 && f->call->wanted; i++)
        status = run_stage(&j, stages[i].tasks, stages[i].task);
    return status;
}
