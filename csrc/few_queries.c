/* SPDX-License-Identifier: Apache-2.0
 *
 * few_queries.c - moves queries to the side of the keys' inputs, attends to the inputs, and moves the sums to the
 * values' side.
 *
 *      absorb           t = Wk_h^T q_h for every lane                            task: item, head
 *      pack             t as panels                                              task: item, panel
 *      attend           softmax and sums over one segment of keys                task: item, panel, segment
 *      merge            the segments of a panel, in order                        task: item, panel
 *      emit             context = Wv_h y + bv                                    task: item, head
 *      pack query       t as panels of the heads of one query                    task: item, query
 *      probabilities    from scores that are computed again                      task: item, query, segment
 *
 * Owns: the order of additions along the keys: blocks as in attention.c, then segments of SEGMENT_BLOCKS blocks.
 */
#include "few_queries.h"

#include <math.h>
#include <string.h>

#include "walk.h"

enum {
    SEGMENT_BLOCKS = 8, /* key blocks; with segments, one query of one item keeps several threads busy */
    MIN_FEATURES = MHA_MAX_VECTOR_LANES, /* of keys and values: rows of Wk are read in whole vectors */
    MIN_GAIN = 2,                        /* the path is chosen if it takes less than half of the operations */
};

static bool is_possible(const mha_layer *layer, const mha_call *call)
{
    /* Extra and static keys have no input. Dropout is for training. Scores lack a constant here, so they cannot be
     * returned. Products of int8 would need weights the other way round. */
    return layer->widths.Ek >= MIN_FEATURES && layer->widths.Ev >= MIN_FEATURES &&
           mha_extra_keys(layer, call) == 0 && !call->static_k.data && !call->static_v.data && !layer->k.scale &&
           !layer->v.scale && !(call->dropout_p > 0) && call->L > 0 && call->wanted != MHA_WANT_SCORES;
}

/* It does not depend on what is multiplied, nor on the CPU, since the path decides about bits. */
static bool pays(const mha_layer *layer, const mha_call *call, size_t live_keys)
{
    const mha_widths *w = &layer->widths;
    const double L = (double)call->L, S = (double)live_keys, H = (double)w->H, Hkv = (double)w->Hkv;
    const double D = (double)w->D, Dv = (double)w->Dv, Ek = (double)w->Ek, Ev = (double)w->Ev;
    const double this_way = L * H * (S * (Ek + Ev) + D * Ek + Dv * Ev);
    const double other_way = S * Hkv * (D * Ek + Dv * Ev) + L * S * H * (D + Dv);
    return (double)MIN_GAIN * this_way < other_way;
}

void mha_pick_few_queries(const mha_layer *layer, const mha_call *call, mha_items *items)
{
    if (is_possible(layer, call))
        for (size_t n = 0; n < call->N; n++)
            items->is_picked[n] = call->is_few ? call->is_few[n] : pays(layer, call, mha_live_keys(&items->all, n));
}

/* ---- The plan ---- */

static size_t lanes_of(const mha_few_queries *f)
{
    return f->a->L * f->layer->widths.H;
}

static size_t padded_lanes(const mha_few_queries *f)
{
    return f->split.vectors * f->layer->kernels->lanes;
}

static size_t max_segments(const mha_batch *batch)
{
    size_t segments = 1; /* the first one sets up the statistics of an item without live keys, too */
    for (size_t i = 0; i < batch->count; i++)
        segments = mha_larger(segments, mha_divide_up(mha_key_blocks(batch, i), SEGMENT_BLOCKS));
    return segments;
}

/* A thread's scratch: scores of a panel, a slice of a block's inputs, the same with zeros for numbers that are not
 * finite, strips of some panels or the probabilities of all heads of a query, and the narrow rows of y of a head. */
typedef struct {
    char *scores, *bias, *factor, *slice, *finite, *rows, *narrow;
} scratch_pieces;

/* Words between narrow rows of y. */
static size_t narrow_words(const mha_few_queries *f)
{
    return f->layer->v.narrow ? f->layer->v.narrow->row_words(f->layer->widths.Ev) : 0;
}

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
    const size_t finite = mha_reserve(layout, MHA_BLOCK_KEYS, MHA_CHAIN, size);
    const size_t strips = mha_larger(f->a->L * mha_panels_at_once(f->a->L), H);
    const size_t rows = mha_reserve(layout, strips, mha_larger(MHA_BLOCK_KEYS, P), size);
    const size_t narrow = mha_reserve(layout, f->a->L, narrow_words(f), sizeof(uint32_t));
    return base ? (scratch_pieces){.scores = base + scores, .bias = base + bias, .factor = base + factor,
                                   .slice = base + slice, .finite = base + finite, .rows = base + rows,
                                   .narrow = base + narrow}
                : (scratch_pieces){0};
}

size_t mha_plan_few_queries(mha_few_queries *f, const mha_attention *a, const mha_layer *layer, const mha_rows *key,
                            const mha_rows *value, mha_plan *plan)
{
    const mha_widths *w = &layer->widths;
    const mha_kernels *kernels = layer->kernels;
    const size_t size = kernels->size, items = a->batch->count;
    mha_layout scratch = {0};
    f->a = a;
    f->layer = layer;
    f->key = key;
    f->value = value;
    f->split = mha_split_width(kernels, lanes_of(f));
    f->by_head = mha_split_width(kernels, w->H);
    f->segments = max_segments(f->a->batch);
    f->t_stride = mha_row_stride(w->Ek, kernels->lanes, size);
    f->y_stride = mha_row_stride(w->Ev, kernels->lanes, size);
    const size_t padded = padded_lanes(f), rows = items * lanes_of(f);
    const size_t lanes = mha_times(&plan->layout, mha_times(&plan->layout, items, f->segments), padded);
    const size_t widest = kernels->vectors * kernels->lanes; /* statistics are read a whole panel at a time */
    const size_t by_head = f->by_head.vectors * kernels->lanes;
    mha_place(plan, &f->t, rows, f->t_stride, size);
    mha_place(plan, &f->t_panels, items * padded, w->Ek, size);
    mha_place(plan, &f->query_panels, f->a->wanted ? items * f->a->L * by_head : 0, w->Ek, size);
    mha_place(plan, &f->sums, lanes, w->Ev, size);
    mha_place(plan, &f->maximum, lanes + widest, 1, size);
    mha_place(plan, &f->sum, lanes + widest, 1, size);
    mha_place(plan, &f->y, rows, f->y_stride, size);
    mha_place(plan, &f->bias_factor, items * padded, 1, size);
    mha_place(plan, &f->is_given_up, items, f->a->L, sizeof *f->is_given_up);
    take_scratch(f, NULL, &scratch);
    return scratch.bytes;
}

/* ---- Places in the workspace ---- */

static scratch_pieces scratch_of(const mha_few_queries *f, size_t worker)
{
    mha_layout layout = {0};
    char *base = mha_scratch_of(f->a->team, worker);
    const scratch_pieces pieces = take_scratch(f, base, &layout);
    mha_guard(&layout, base);
    return pieces;
}

static char *numbers_at(const mha_few_queries *f, char *numbers, size_t index)
{
    return numbers + index * f->layer->kernels->size;
}

/* The results of a panel, from its first lane on, for one segment of keys. */
typedef struct {
    char *sums;          /* [Ev][P] */
    char *maximum, *sum; /* [P] */
} partial;

static partial partial_at(const mha_few_queries *f, size_t i, size_t segment, size_t lane)
{
    const size_t at = (i * f->segments + segment) * padded_lanes(f) + lane;
    return (partial){numbers_at(f, f->sums, at * f->layer->widths.Ev), numbers_at(f, f->maximum, at),
                     numbers_at(f, f->sum, at)};
}

/* ---- What is given up ---- */

static bool is_given_up(const mha_few_queries *f, size_t i, size_t l)
{
    return atomic_load_explicit(&f->is_given_up[i * f->a->L + l], memory_order_relaxed);
}

/* Gives up query l of an item if one of these numbers, which belong to it, is not finite. */
static void give_up_unless_finite(const mha_few_queries *f, size_t i, size_t l, const char *numbers, size_t count)
{
    if (!f->layer->kernels->is_finite(numbers, count))
        atomic_store_explicit(&f->is_given_up[i * f->a->L + l], true, memory_order_relaxed);
}

/* The same for several lanes. Column i of x [rows][lanes] belongs to lane first_lane + i. */
static void give_up_lanes(const mha_few_queries *f, size_t i, size_t first_lane, size_t count, const char *x,
                          size_t rows, size_t lanes)
{
    const size_t size = f->layer->kernels->size;
    if (f->layer->kernels->is_finite(x, rows * lanes))
        return;
    for (size_t lane = 0; lane < count; lane++) {
        const size_t l = (first_lane + lane) / f->layer->widths.H;
        for (size_t row = 0; row < rows && !is_given_up(f, i, l); row++)
            give_up_unless_finite(f, i, l, x + (row * lanes + lane) * size, 1);
    }
}

static size_t count_given_up(const mha_few_queries *f, size_t i)
{
    size_t count = 0;
    for (size_t l = 0; l < f->a->L; l++)
        count += is_given_up(f, i, l);
    return count;
}

mha_status mha_give_up_items(const mha_few_queries *f, const mha_call *call, mha_items *items, mha_saved *saved)
{
    const mha_batch *batch = f->a->batch;
    size_t queries = 0;
    for (size_t i = 0; i < batch->count; i++) {
        const size_t given_up = count_given_up(f, i);
        items->is_picked[mha_item_index(batch, i)] = given_up == 0;
        queries += given_up > 0 ? f->a->L - given_up : 0;
    }
    if (queries == 0)
        return MHA_OK;
    const mha_status status = mha_make_room(saved, f->layer, call, queries);
    for (size_t i = 0; status == MHA_OK && i < batch->count; i++)
        for (size_t l = 0; l < f->a->L && !items->is_picked[mha_item_index(batch, i)]; l++)
            if (!is_given_up(f, i, l))
                mha_save_results(saved, mha_item_index(batch, i), l);
    return status;
}

/* ---- Keys' inputs ---- */

/* Copies `features` features of the block's inputs from feature `first` on. The rows of the copy are slice_stride()
 * numbers apart. */
static void copy_inputs(const mha_few_queries *f, const mha_rows *x, size_t i, const mha_key_block *block,
                        size_t first, size_t features, char *slice)
{
    const mha_kernels *kernels = f->layer->kernels;
    const size_t bytes = slice_stride(kernels) * kernels->size;
    const char *item = mha_row_at(x, i, 0, 0) + (ptrdiff_t)first * x->element;
    for (size_t k = 0; k < block->keys; k++)
        mha_copy_row(item + (ptrdiff_t)mha_key_index(block, k) * x->row, x->element, features, kernels->size,
                     slice + k * bytes);
}

/* ---- absorb ---- */

/* Computes some features of the rows of t for one head: q_h times rows of Wk, which are read in place, as panels side
 * by side. The last vector ends with the last feature, so that nothing is read beyond the matrix. The features that it
 * shares with the vector before are computed twice, to the same bits. */
static void absorb_window(const mha_few_queries *f, size_t i, size_t h, size_t first, size_t vectors, size_t panels)
{
    const mha_layer *layer = f->layer;
    const mha_widths *w = &layer->widths;
    const size_t hkv = h / (w->H / w->Hkv), b_size = mha_size_of(layer->k_weight_type);
    const char *Wk = (const char *)layer->k_weight + (hkv * w->D * w->Ek + first) * b_size;
    char *t = numbers_at(f, f->t, (i * lanes_of(f) + h) * f->t_stride + first);
    mha_product product = {.rows = f->a->L, .vectors = vectors, .a = mha_row_at(&f->a->q, i, h, 0),
                           .a_row = mha_stride_of(&f->a->q), .a_k = 1, .b = Wk, .b_k = w->Ek,
                           .b_type = layer->k_weight_type, .more_panels = panels - 1,
                           .b_panel_bytes = vectors * layer->kernels->lanes * b_size, .c = t,
                           .c_row = w->H * f->t_stride};
    mha_multiply_chained(layer->kernels, NULL, &product, w->D);
}

/* Checks that the constants q_h bk_h / sqrt(D) of a head's rows are finite. No score contains them, so a check of the
 * scores does not notice them. bk_h fills one lane of a panel. */
static void check_constants(const mha_few_queries *f, size_t i, size_t h, const scratch_pieces *s)
{
    const mha_layer *layer = f->layer;
    const mha_widths *w = &layer->widths;
    const mha_kernels *kernels = layer->kernels;
    const size_t size = kernels->size, P = kernels->lanes;
    const char *q = mha_row_at(&f->a->q, i, h, 0);
    const char *bk = layer->k.bias + h / (w->H / w->Hkv) * w->D * size;
    mha_product product = {.rows = f->a->L, .vectors = 1, .a_row = mha_stride_of(&f->a->q), .a_k = 1, .b = s->slice,
                           .b_k = P, .addend_row = P, .c = s->rows, .c_row = P};
    for (size_t d = 0; d < w->D; d += MHA_CHAIN) {
        product.depth = mha_smaller(w->D - d, MHA_CHAIN);
        kernels->pack_panel(bk + d * size, 0, 1, product.depth, f->a->rules->scale, s->slice, 1);
        product.a = q + d * size;
        product.addend = d ? s->rows : NULL;
        kernels->product(&product);
    }
    for (size_t l = 0; l < f->a->L; l++)
        give_up_unless_finite(f, i, l, s->rows + l * P * size, P);
}

static void absorb_task(void *context, size_t task, size_t worker)
{
    const mha_few_queries *f = context;
    const mha_kernels *kernels = f->layer->kernels;
    const size_t H = f->layer->widths.H, i = task / H, h = task % H, Ek = f->layer->widths.Ek;
    const scratch_pieces s = scratch_of(f, worker);
    size_t e = 0;
    if (f->layer->k.bias)
        check_constants(f, i, h, &s);
    while (Ek - e >= kernels->lanes) {
        const size_t left = (Ek - e) / kernels->lanes, vectors = mha_smaller(left, kernels->vectors);
        const size_t panels = mha_smaller(left / vectors, mha_panels_at_once(f->a->L));
        absorb_window(f, i, h, e, vectors, panels);
        e += panels * vectors * kernels->lanes;
    }
    if (e < Ek)
        absorb_window(f, i, h, Ek - kernels->lanes, 1, 1);
}

static void pack_task(void *context, size_t task, size_t worker)
{
    const mha_few_queries *f = context;
    const size_t Ek = f->layer->widths.Ek, i = task / f->split.panels;
    const mha_panel panel = mha_panel_at(&f->split, task % f->split.panels);
    (void)worker;
    f->layer->kernels->pack_panel(numbers_at(f, f->t, (i * lanes_of(f) + panel.first) * f->t_stride), f->t_stride,
                                  panel.count, Ek, f->a->rules->scale,
                                  numbers_at(f, f->t_panels, (i * padded_lanes(f) + panel.first) * Ek),
                                  panel.vectors);
}

/* ---- attend ---- */

/* Computes the masked scores of a panel for the visible keys of a block. `first` is the index of lane 0 in the item. A
 * visible score that is not finite gives its query up. */
static mha_visible score_inputs(const mha_few_queries *f, size_t i, size_t first, mha_panel panel,
                                const mha_key_block *block, const char *queries, const scratch_pieces *s)
{
    const mha_kernels *kernels = f->layer->kernels;
    const size_t P = panel.vectors * kernels->lanes, Ek = f->layer->widths.Ek;
    const mha_lanes lanes = {0, f->layer->widths.H, first, panel.count, panel.vectors};
    const size_t n = mha_item_index(f->a->batch, i);
    const mha_visible visible = mha_apply_rules(kernels, f->a->rules, n, &lanes, block, s->bias);
    mha_product product = {.rows = visible.keys, .vectors = panel.vectors, .a = s->slice,
                           .a_row = (ptrdiff_t)slice_stride(kernels), .a_k = 1, .b_k = P, .addend_row = P,
                           .c = s->scores, .c_row = P};
    mha_key_block seen = *block;
    seen.keys = visible.keys;
    for (size_t e = 0; e < Ek && seen.keys > 0; e += MHA_CHAIN) {
        product.depth = mha_smaller(Ek - e, MHA_CHAIN);
        copy_inputs(f, f->key, i, &seen, e, product.depth, s->slice);
        product.b = queries + e * P * kernels->size;
        product.addend = e ? s->scores : NULL;
        kernels->product(&product);
    }
    if (!kernels->is_finite(s->scores, visible.keys * P)) { /* before the masks are added, which may be infinite */
        if (visible.is_biased)
            kernels->hide(s->scores, s->bias, visible.keys * P, 0);
        give_up_lanes(f, i, first, panel.count, s->scores, visible.keys, P);
    }
    if (visible.is_biased)
        kernels->add(s->scores, s->scores, s->bias, visible.keys * P);
    return visible;
}

/* One panel and one segment of the keys of an item. */
typedef struct {
    size_t i, first_block, end_block;
    mha_panel panel;
    const char *queries;
    partial results;
} few_segment;

/* sums = sums * factor + x^T exps, for a slice of features at a time. */
static void add_values(const mha_few_queries *f, const few_segment *g, const mha_key_block *block, const char *bias,
                       const scratch_pieces *s, bool is_careful)
{
    const mha_kernels *kernels = f->layer->kernels;
    const size_t P = g->panel.vectors * kernels->lanes, Ev = f->layer->widths.Ev;
    mha_product product = {.depth = block->keys, .vectors = g->panel.vectors, .a = s->slice, .a_row = 1,
                           .a_k = (ptrdiff_t)slice_stride(kernels), .b = s->scores, .b_k = P, .addend_row = P,
                           .factor = s->factor, .c_row = P};
    for (size_t e = 0; e < Ev; e += MHA_CHAIN) {
        product.rows = mha_smaller(Ev - e, MHA_CHAIN);
        copy_inputs(f, f->value, g->i, block, e, product.rows, s->slice);
        product.addend = product.c = g->results.sums + e * P * kernels->size;
        const mha_product finite = is_careful ? mha_with_finite_values(kernels, &product, s->finite) : product;
        kernels->product(&finite);
        if (is_careful)
            mha_add_other_values(kernels, &product, bias);
    }
}

static void attend_segment(const mha_few_queries *f, const few_segment *g, const scratch_pieces *s, bool is_careful)
{
    const mha_kernels *kernels = f->layer->kernels;
    const size_t vectors = g->panel.vectors;
    const partial *r = &g->results;
    kernels->softmax_begin(r->maximum, r->sum, vectors);
    kernels->fill(r->sums, f->layer->widths.Ev * vectors * kernels->lanes, 0);
    for (size_t b = g->first_block; b < g->end_block; b++) {
        mha_key_block block;
        mha_key_block_at(f->a->batch, g->i, b, &block);
        const mha_visible visible = score_inputs(f, g->i, g->panel.first, g->panel, &block, g->queries, s);
        block.keys = visible.keys;
        if (block.keys == 0)
            continue;
        kernels->softmax_step(s->scores, block.keys, vectors, s->scores, r->maximum, r->sum, s->factor);
        add_values(f, g, &block, visible.is_biased ? s->bias : NULL, s, is_careful);
    }
}

/* Sums that are not finite are computed once more, with care, because the reason may be hidden. */
static void attend_segment_task(void *context, size_t task, size_t worker)
{
    const mha_few_queries *f = context;
    const scratch_pieces s = scratch_of(f, worker);
    const size_t segment = task % f->segments, i = task / f->segments / f->split.panels;
    const size_t first = segment * SEGMENT_BLOCKS, Ev = f->layer->widths.Ev;
    const mha_panel panel = mha_panel_at(&f->split, task / f->segments % f->split.panels);
    const few_segment g = {
        .i = i, .panel = panel,
        .first_block = first, .end_block = mha_smaller(first + SEGMENT_BLOCKS, mha_key_blocks(f->a->batch, i)),
        .queries = numbers_at(f, f->t_panels, (i * padded_lanes(f) + panel.first) * f->layer->widths.Ek),
        .results = partial_at(f, i, segment, panel.first),
    };
    attend_segment(f, &g, &s, false);
    if (!f->layer->kernels->is_finite(g.results.sums, Ev * panel.vectors * f->layer->kernels->lanes))
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
    const mha_few_queries *f = context;
    const mha_kernels *kernels = f->layer->kernels;
    const size_t i = task / f->split.panels, Ev = f->layer->widths.Ev;
    const mha_panel panel = mha_panel_at(&f->split, task % f->split.panels);
    const partial all = partial_at(f, i, 0, panel.first); /* segment 0 collects the others */
    for (size_t segment = 1; segment < f->segments; segment++) {
        const partial next = partial_at(f, i, segment, panel.first);
        kernels->softmax_merge(all.sums, all.maximum, all.sum, next.sums, next.maximum, next.sum, Ev, panel.vectors);
    }
    char *bias_factor = numbers_at(f, f->bias_factor, i * padded_lanes(f) + panel.first);
    for (size_t lane = 0; lane < panel.count; lane++)
        kernels->fill(bias_factor + lane * kernels->size, 1, is_zero(kernels, all.sum + lane * kernels->size) ? 0 : 1);
    char *inverse = scratch_of(f, worker).factor;
    kernels->softmax_end(all.sum, inverse, panel.vectors, mha_empty_row_of(f->a));
    kernels->unpack_panel(all.sums, panel.vectors, inverse, panel.count, Ev,
                          numbers_at(f, f->y, (i * lanes_of(f) + panel.first) * f->y_stride), f->y_stride);
}

/* ---- emit ---- */

/* The rows of y of a head, and the numbers or narrow words between them. */
typedef struct {
    const char *data;
    size_t stride;
} rows_of_head;

/* If Wv is narrow, so are the rows, which are written to `narrow`. */
static rows_of_head take_rows_of_y(const mha_few_queries *f, size_t i, size_t h, char *narrow)
{
    const mha_widths *w = &f->layer->widths;
    const rows_of_head y = {numbers_at(f, f->y, (i * lanes_of(f) + h) * f->y_stride), w->H * f->y_stride};
    const size_t words = narrow_words(f);
    if (!f->layer->v.narrow)
        return y;
    for (size_t l = 0; l < f->a->L; l++)
        f->layer->v.narrow->take_row((const float *)(const void *)y.data + l * y.stride, w->Ev, 0,
                                     (uint32_t *)(void *)narrow + l * words);
    return (rows_of_head){narrow, words};
}

/* Multiplies by a panel of Wv, or some at once, for one head, through a strip. Features of other heads may be in it. */
static void emit_panels(const mha_few_queries *f, size_t i, size_t h, mha_panel panel, size_t at_once,
                        const rows_of_head *y, char *strip)
{
    const mha_layer *layer = f->layer;
    const mha_widths *w = &layer->widths;
    const mha_kernels *kernels = layer->kernels;
    const size_t size = kernels->size, P = panel.vectors * kernels->lanes, width = at_once * P;
    const size_t groups = mha_groups(&layer->v, w->Ev);
    mha_product product = {.rows = f->a->L, .vectors = panel.vectors, .a = y->data,
                           .a_row = (ptrdiff_t)y->stride, .a_k = 1,
                           .b = mha_panel_row(&layer->v, &panel, 0), .b_k = P, .b_type = layer->v.type,
                           .more_panels = at_once - 1, .b_panel_bytes = groups * P * layer->v.group_bytes,
                           .addend_row = width, .c = strip, .c_row = width};
    mha_multiply_chained(kernels, layer->v.narrow, &product, groups);
    if (layer->v.bias) {
        product.b_type = kernels->dtype;
        product.b_panel_bytes = P * size;
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
    for (size_t l = 0; l < f->a->L; l++)
        memcpy(mha_row_at(&f->a->context, i, h, l) + (from - head) * size,
               strip + (l * width + from - panel.first) * size, (to - from) * size);
}

/* Checks that the context of a head is finite. If a number in values, Wv or bv is not finite, nor is the context. A
 * query that sees no key may have NaN on purpose. */
static void check_context(const mha_few_queries *f, size_t i, size_t h)
{
    const mha_widths *w = &f->layer->widths;
    const mha_kernels *kernels = f->layer->kernels;
    for (size_t l = 0; l < f->a->L; l++) {
        const bool is_empty = is_zero(kernels, numbers_at(f, f->bias_factor, i * padded_lanes(f) + l * w->H + h));
        if (!is_empty || mha_empty_row_of(f->a) != MHA_EMPTY_ROW_NAN)
            give_up_unless_finite(f, i, l, mha_row_at(&f->a->context, i, h, l), w->Dv);
    }
}

static void emit_task(void *context, size_t task, size_t worker)
{
    const mha_few_queries *f = context;
    const mha_widths *w = &f->layer->widths;
    const size_t i = task / w->H, h = task % w->H, head = h / (w->H / w->Hkv) * w->Dv;
    const mha_split *split = &f->layer->v.split;
    const scratch_pieces s = scratch_of(f, worker);
    const rows_of_head y = take_rows_of_y(f, i, h, s.narrow);
    size_t p = 0, end = split->panels, at_once;
    while (mha_panel_at(split, p).first + mha_panel_at(split, p).count <= head)
        p++;
    while (mha_panel_at(split, end - 1).first >= head + w->Dv)
        end--;
    for (; p < end; p += at_once) {
        const mha_panel panel = mha_panels_at(split, p, mha_smaller(mha_panels_at_once(f->a->L), end - p), &at_once);
        emit_panels(f, i, h, panel, at_once, &y, s.rows);
    }
    check_context(f, i, h);
}

/* ---- probabilities ---- */

/* Packs the heads of one query as panels of their own, because averages are sums over these heads. */
static void pack_query_task(void *context, size_t task, size_t worker)
{
    const mha_few_queries *f = context;
    const mha_widths *w = &f->layer->widths;
    const size_t padded = f->by_head.vectors * f->by_head.lanes;
    (void)worker;
    for (size_t p = 0; p < f->by_head.panels; p++) {
        const mha_panel panel = mha_panel_at(&f->by_head, p);
        f->layer->kernels->pack_panel(numbers_at(f, f->t, (task * w->H + panel.first) * f->t_stride), f->t_stride,
                                      panel.count, w->Ek, f->a->rules->scale,
                                      numbers_at(f, f->query_panels, (task * padded + panel.first) * w->Ek),
                                      panel.vectors);
    }
}

/* One query of an item, and what its probabilities are made with. */
typedef struct {
    size_t i, l;
    const char *panels;        /* of the query's heads */
    const char *maximum, *sum; /* of head 0 */
} one_query;

static one_query describe_query(const mha_few_queries *f, size_t query)
{
    const mha_widths *w = &f->layer->widths;
    const size_t i = query / f->a->L, l = query % f->a->L;
    const partial all = partial_at(f, i, 0, l * w->H);
    return (one_query){
        .i = i, .l = l,
        .panels = numbers_at(f, f->query_panels, query * f->by_head.vectors * f->by_head.lanes * w->Ek),
        .maximum = all.maximum, .sum = all.sum,
    };
}

/* rows[h][key]: the probabilities of all heads of one query for a block, or their average in rows[0]. Keys that are
 * hidden from every head get 0, or NaN if the query sees no key. */
static void probabilities_of_block(const mha_few_queries *f, const one_query *q, const mha_key_block *block,
                                   bool is_hidden, const scratch_pieces *s)
{
    const mha_kernels *kernels = f->layer->kernels;
    const size_t size = kernels->size, H = f->layer->widths.H;
    const bool is_averaged = f->a->wanted == MHA_WANT_AVERAGES;
    for (size_t p = 0; p < f->by_head.panels; p++) {
        const mha_panel panel = mha_panel_at(&f->by_head, p);
        const size_t P = panel.vectors * kernels->lanes;
        const char *queries = q->panels + panel.first * f->layer->widths.Ek * size;
        const size_t lane = q->l * H + panel.first;
        const size_t seen = is_hidden ? 0 : score_inputs(f, q->i, lane, panel, block, queries, s).keys;
        kernels->fill(s->scores + seen * P * size, (block->keys - seen) * P, -INFINITY);
        kernels->softmax_probabilities(s->scores, block->keys, panel.vectors, q->maximum + panel.first * size,
                                       q->sum + panel.first * size);
        kernels->fill(s->factor, P, is_averaged ? 1 / (double)H : 1);
        kernels->unpack_panel(s->scores, panel.vectors, s->factor, panel.count, block->keys,
                              s->rows + panel.first * MHA_BLOCK_KEYS * size, MHA_BLOCK_KEYS);
    }
    for (size_t h = 1; is_averaged && h < H; h++)
        kernels->add(s->rows, s->rows, s->rows + h * MHA_BLOCK_KEYS * size, MHA_BLOCK_KEYS);
}

/* Copies what probabilities_of_block() computed for key i of its block to the column of the key with this index. */
static void write_probability(const mha_few_queries *f, const one_query *q, size_t i, size_t index,
                              const scratch_pieces *s)
{
    const size_t size = f->layer->kernels->size;
    const size_t heads = f->a->wanted == MHA_WANT_PROBABILITIES ? f->layer->widths.H : 1;
    for (size_t h = 0; h < heads; h++)
        memcpy(mha_row_at(&f->a->probabilities, q->i, h, q->l) + index * size,
               s->rows + (h * MHA_BLOCK_KEYS + i) * size, size);
}

static void probabilities_task(void *context, size_t task, size_t worker)
{
    const mha_few_queries *f = context;
    const mha_batch *batch = f->a->batch;
    const scratch_pieces s = scratch_of(f, worker);
    const one_query q = describe_query(f, task / f->segments);
    const size_t segment = task % f->segments, first = segment * SEGMENT_BLOCKS;
    const size_t end = mha_smaller(first + SEGMENT_BLOCKS, mha_key_blocks(batch, q.i));
    for (size_t b = first; b < end; b++) {
        mha_key_block block;
        mha_key_block_at(batch, q.i, b, &block);
        probabilities_of_block(f, &q, &block, false, &s);
        for (size_t k = 0; k < block.keys; k++)
            write_probability(f, &q, k, mha_key_index(&block, k), &s);
    }
    if (segment == 0 && batch->index) {
        const mha_key_block one = {.keys = 1};
        probabilities_of_block(f, &q, &one, true, &s);
        for (size_t k = mha_next_removed(batch, q.i, 0); k < batch->S; k = mha_next_removed(batch, q.i, k + 1))
            write_probability(f, &q, 0, k, &s);
    }
}

/* ---- All stages ---- */

mha_status mha_attend_few_queries(const mha_few_queries *f)
{
    const size_t items = f->a->batch->count, H = f->layer->widths.H;
    const size_t panels = items * f->split.panels, queries = items * f->a->L;
    const struct {
        size_t tasks;
        mha_task task;
    } stages[] = {
        {items * H, absorb_task},
        {panels, pack_task},
        {panels * f->segments, attend_segment_task},
        {panels, merge_task},
        {items * H, emit_task},
        /* for the probabilities: */
        {queries, pack_query_task},
        {queries * f->segments, probabilities_task},
    };
    enum { STAGES = sizeof stages / sizeof *stages, TO_CONTEXT = STAGES - 2 };
    mha_status status = MHA_OK;
    for (size_t i = 0; i < items * f->a->L; i++)
        atomic_init(&f->is_given_up[i], false);
    for (size_t i = 0; i < (f->a->wanted ? STAGES : TO_CONTEXT) && status == MHA_OK; i++)
        status = mha_parallel_for(f->a->team, stages[i].tasks, stages[i].task, (void *)f);
    return status;
}
