/* SPDX-License-Identifier: Apache-2.0
 *
 * attention.c - attention in one pass over the keys.
 *
 * Queries are the lanes. A panel holds up to P queries of one head, transposed. Every step of softmax runs down the
 * keys, and no lane looks at another. A task takes a few panels of query heads that share a key/value head or a mask.
 * It leads them together over the blocks of keys:
 *
 *      panel [D][P]        scores [64][P]        out [Dv][P]
 *      +---------+         +---------+           +---------+
 *      | queries |  -K->   | keys    |  -V^T->   | context |    out = out * factor + V^T exp(scores - maximum)
 *      +---------+         +---------+           +---------+
 *
 * So no matrix of size L x S exists. (The online softmax: Milakov and Gimelshein, "Online normalizer calculation for
 * softmax", 2018. In blocks of queries and keys: Dao et al., "FlashAttention", 2022.)
 *
 * Owns: the order of additions along the keys, in blocks of MHA_BLOCK_KEYS live keys. It does not depend on tasks.
 */
#include "attention.h"

#include <math.h>
#include <string.h>

enum {
    MAX_PANEL_BYTES = 131072, /* of all panels of a task, unless a single panel is larger */
    TASKS_PER_THREAD = 4,
    COPY_PANELS = 8, /* of a task that copies blocks, at most: more than others, to share the copies */
    COPY_HEADS = 2,  /* key/value heads whose block is copied at the same time */
    FEATURES_PER_POLL = 1024, /* D + Dv, added up over the blocks between two polls */
};

/* Whether queries, keys, values and context are halves. */
static bool has_halves(const mha_attention *a)
{
    return mha_is_half(a->q.type);
}

/* Whether tasks copy blocks of keys and values: to widen halves, to narrow them for products of bfloat16, or both. */
static bool copies_blocks(const mha_attention *a)
{
    return a->narrow || has_halves(a);
}

/* Whether there is a mask that all heads share. */
static bool is_mask_shared(const mha_attention *a)
{
    return a->rules->attn.kind && a->rules->attn.stride_h == 0;
}

/* The number of heads whose panels are shared out together. They are all heads if each has one panel only, because a
 * task would be too small. They are all heads, too, if they share a mask, because reading it costs more than reading
 * keys and values. Copying these costs even more, so that a few heads share the mask then. */
static size_t bundled_heads(const mha_attention *a)
{
    if (a->split.panels == 1)
        return a->H;
    if (!is_mask_shared(a))
        return a->heads_per_kv;
    if (!copies_blocks(a))
        return a->H;
    return a->heads_per_kv == 1 && a->H % COPY_HEADS == 0 ? COPY_HEADS : a->heads_per_kv;
}

/* Whether a query may see fewer keys than its item has. */
static bool can_hide(const mha_attention *a)
{
    return a->rules->attn.kind || a->rules->padding.kind || a->rules->is_causal;
}

static size_t max_task_panels(const mha_attention *a)
{
    const size_t fit = MAX_PANEL_BYTES / (mha_widest_panel(a) * (a->D + a->Dv) * a->kernels->size);
    const size_t most = copies_blocks(a) ? COPY_PANELS : MHA_MAX_TASK_PANELS;
    const size_t wanted = mha_smaller(most, bundled_heads(a) * a->split.panels);
    return fit < 1 ? 1 : mha_smaller(fit, wanted);
}

/* ---- Scratch ---- */

/* The length of a copied key, in numbers, or in words if it is narrow. */
static size_t copied_key(const mha_attention *a)
{
    return a->narrow ? a->narrow->row_words(a->D) : a->D;
}

/* The distance between copied values, in the same units. Narrow ones are padded to whole vectors. */
static size_t copied_value(const mha_attention *a)
{
    return a->narrow ? mha_divide_up(a->Dv, a->kernels->lanes) * a->kernels->lanes : a->Dv;
}

void mha_plan_panels(mha_attention *a, size_t panels)
{
    const size_t P = mha_widest_panel(a), keys = mha_max_block_keys(a), size = a->kernels->size;
    mha_attention_scratch *at = &a->at;
    mha_layout layout = {0}, state = {0};
    at->scores = mha_reserve(&layout, keys, P, size);
    at->bias = mha_reserve(&layout, keys, P, size);
    if (can_hide(a))
        at->finite = mha_reserve(&layout, keys, a->Dv, size);
    if (copies_blocks(a)) {
        at->keys = mha_reserve(&layout, COPY_HEADS * keys, copied_key(a), size);
        at->values = mha_reserve(&layout, COPY_HEADS * keys, copied_value(a), size);
    }
    if (has_halves(a))
        at->wide = mha_reserve(&layout, mha_larger(keys, P), mha_larger(a->D, a->Dv), size);
    if (a->narrow)
        at->narrow_exps = mha_reserve(&layout, keys, P, size);
    if (a->narrow && can_hide(a))
        at->rounded = mha_reserve(&layout, keys, a->Dv, size);
    at->queries = mha_reserve(&state, a->D, P, size);
    at->out = mha_reserve(&state, a->Dv, P, size);
    at->maximum = mha_reserve(&state, 1, P, size);
    at->sum = mha_reserve(&state, 1, P, size);
    at->factor = mha_reserve(&state, 1, P, size);
    at->state_bytes = state.bytes;
    at->states = mha_reserve_copies(&layout, panels, &state);
    at->layout = layout;
}

/* The state is filled in where it stays: a copy would wait for the stores to reach the cache. */
void mha_set_up_panel(const mha_attention *a, size_t worker, size_t i, size_t item, size_t h, mha_panel panel,
                      mha_panel_state *s)
{
    char *base = mha_scratch_of(a->team, worker), *state = base + a->at.states + i * a->at.state_bytes;
    mha_guard(&a->at.layout, base);
    s->base = base;
    s->bias = base + a->at.bias;
    s->queries = state + a->at.queries;
    s->out = state + a->at.out;
    s->maximum = state + a->at.maximum;
    s->sum = state + a->at.sum;
    s->factor = state + a->at.factor;
    s->item = item;
    s->h = h;
    s->hkv = h / a->heads_per_kv;
    s->keys = s->values = NULL;
    if (copies_blocks(a)) {
        const size_t bytes = s->hkv % COPY_HEADS * mha_max_block_keys(a) * a->kernels->size;
        s->keys = base + a->at.keys + bytes * copied_key(a);
        s->values = base + a->at.values + bytes * copied_value(a);
    }
    s->panel = panel;
    s->is_empty = true;
    s->finite = NULL;
    s->kept = NULL;
}

static const mha_rows *keys_of(const mha_attention *a, const mha_key_block *block)
{
    return block->is_extra ? &a->extra_k : &a->k;
}

static const mha_rows *values_of(const mha_attention *a, const mha_key_block *block)
{
    return block->is_extra ? &a->extra_v : &a->v;
}

/* ---- Halves ----
 *
 * They are widened where a task reads them, and rounded where it writes them. */

/* Rows of float32, or of float64, `stride` numbers apart. */
typedef struct {
    char *data;
    ptrdiff_t stride;
} wide_rows;

/* Makes rows without gaps between them one long row. Returns the number of rows. */
static size_t join_rows(const mha_rows *x, size_t count, size_t *width)
{
    if (x->row != (ptrdiff_t)(*width * mha_size_of(x->type)))
        return count;
    *width *= count;
    return 1;
}

/* Some rows, from `first` on. Halves are widened to `wide`; others stay where they are. */
static wide_rows widen_rows(const mha_attention *a, const mha_rows *x, char *first, size_t count, size_t width,
                            char *wide)
{
    if (!mha_is_half(x->type))
        return (wide_rows){first, mha_stride_of(x)};
    const wide_rows rows = {wide, (ptrdiff_t)width};
    count = join_rows(x, count, &width);
    for (size_t i = 0; i < count; i++)
        a->kernels->widen(x->type, first + (ptrdiff_t)i * x->row, width, wide + i * width * a->kernels->size);
    return rows;
}

/* Rounds rows of float32 to halves, and writes them from `first` on. */
static void round_rows(const mha_attention *a, const mha_rows *x, const char *wide, size_t count, size_t width,
                       char *first)
{
    count = join_rows(x, count, &width);
    for (size_t i = 0; i < count; i++)
        a->kernels->narrow(x->type, wide + i * width * a->kernels->size, width, first + (ptrdiff_t)i * x->row);
}

/* The keys of a block, or its values. */
static wide_rows widen_block(const mha_attention *a, const mha_panel_state *s, const mha_key_block *block,
                             const mha_rows *x, size_t width, char *wide)
{
    return widen_rows(a, x, mha_row_at(x, s->item, s->hkv, block->first), block->keys, width, wide);
}

/* ---- Products of bfloat16 ----
 *
 * Queries and keys are narrowed in groups of features, exps and values in groups of keys. */

static const float *floats_at(const void *numbers)
{
    return numbers;
}

static uint32_t *words_at(void *words)
{
    return words;
}

/* In their place. */
static void narrow_queries(const mha_attention *a, const mha_panel_state *s)
{
    const size_t P = s->panel.vectors * a->kernels->lanes;
    a->narrow->take_columns(floats_at(s->queries), P, a->D, P, words_at(s->queries));
}

static void narrow_keys(const mha_attention *a, const wide_rows *keys, size_t count, char *narrow)
{
    const size_t words = copied_key(a);
    for (size_t i = 0; i < count; i++)
        a->narrow->take_row(floats_at(keys->data) + (ptrdiff_t)i * keys->stride, a->D, 0,
                            words_at(narrow) + i * words);
}

static void narrow_values(const mha_attention *a, const wide_rows *values, size_t count, char *narrow)
{
    a->narrow->take_columns(floats_at(values->data), (size_t)values->stride, count, a->Dv, words_at(narrow));
}

/* Narrows the exps of a product of values, of which `narrowed` keys are narrow, and returns the product of both. The
 * last visible key may be in a group with a hidden one, whose exps are 0. */
static mha_product narrow_exps(const mha_attention *a, const mha_panel_state *s, const mha_product *values,
                               size_t narrowed, char *exps)
{
    char *narrow = s->base + a->at.narrow_exps;
    const size_t P = values->b_k, keys = mha_smaller(mha_divide_up(values->depth, 2) * 2, narrowed);
    mha_product product = *values;
    a->kernels->fill(exps + values->depth * P * a->kernels->size, (keys - values->depth) * P, 0);
    a->narrow->take_columns(floats_at(exps), P, keys, P, words_at(narrow));
    product.depth = mha_divide_up(keys, a->narrow->group);
    product.a = s->values;
    product.a_k = (ptrdiff_t)copied_value(a);
    product.b = narrow;
    return product;
}

/* The product with values that are rounded, but not narrow. Some of them may only now be infinite. Values that are
 * bfloat16 already stay what they are. */
static mha_product round_values(const mha_attention *a, const mha_panel_state *s, const mha_key_block *block,
                                const mha_product *values)
{
    char *halves = s->values, *rounded = s->base + a->at.rounded;
    const wide_rows wide = widen_block(a, s, block, values_of(a, block), a->Dv, s->base + a->at.wide);
    mha_product product = *values;
    for (size_t key = 0; key < values->depth; key++) {
        a->kernels->narrow(MHA_BFLOAT16, floats_at(wide.data) + (ptrdiff_t)key * wide.stride, a->Dv, halves);
        a->kernels->widen(MHA_BFLOAT16, halves, a->Dv, rounded + key * a->Dv * a->kernels->size);
    }
    product.a = rounded;
    product.a_k = (ptrdiff_t)a->Dv;
    return product;
}

/* ---- Copies of keys and values ----
 *
 * A block is copied once for the panels of a task that read it. */

static void copy_keys(const mha_attention *a, const mha_panel_state *s, const mha_key_block *block)
{
    char *wide = a->narrow ? s->base + a->at.wide : s->keys;
    const wide_rows keys = widen_block(a, s, block, keys_of(a, block), a->D, wide);
    if (a->narrow)
        narrow_keys(a, &keys, block->keys, s->keys);
}

static void copy_values(const mha_attention *a, const mha_panel_state *s, const mha_key_block *block)
{
    char *wide = a->narrow ? s->base + a->at.wide : s->values;
    const wide_rows values = widen_block(a, s, block, values_of(a, block), a->Dv, wide);
    if (a->narrow)
        narrow_values(a, &values, block->keys, s->values);
}

/* ---- Scores of one panel against one block, shared by both passes ---- */

void mha_pack_queries(const mha_attention *a, const mha_panel_state *s)
{
    const wide_rows rows = widen_rows(a, &a->q, mha_row_at(&a->q, s->item, s->h, s->panel.first), s->panel.count, a->D,
                                      s->base + a->at.wide);
    a->kernels->pack_panel(rows.data, (size_t)rows.stride, s->panel.count, a->D, a->query_scale, s->queries,
                           s->panel.vectors);
    if (a->narrow)
        narrow_queries(a, s);
}

static mha_visible apply_rules(const mha_attention *a, const mha_panel_state *s, const mha_key_block *block)
{
    const mha_lanes of_head = {s->h, 1, s->panel.first, s->panel.count, s->panel.vectors};
    return mha_apply_rules(a->kernels, a->rules, mha_item_index(a->batch, s->item), &of_head, block, s->bias);
}

/* A product without depth multiplies its addend. softmax_step() has not set s->factor yet. */
static void multiply_scores(const mha_attention *a, const mha_panel_state *s, size_t keys, char *scores)
{
    const size_t P = s->panel.vectors * a->kernels->lanes;
    const mha_product product = {.rows = keys, .vectors = s->panel.vectors, .a = scores, .b = scores, .b_k = P,
                                 .addend = scores, .addend_row = P, .factor = s->factor, .c = scores, .c_row = P};
    a->kernels->fill(s->factor, P, a->score_factor);
    a->kernels->product(&product);
}

/* scores[key][lane] of the visible keys. The bias is added last, if there is one. Chains have at most MHA_CHAIN
 * features, as in projections. */
static void score(const mha_attention *a, const mha_panel_state *s, const mha_key_block *block, mha_visible visible,
                  char *scores, const mha_prefetch *prefetch)
{
    const mha_kernels *kernels = a->kernels;
    const size_t P = s->panel.vectors * kernels->lanes;
    const mha_rows *keys = keys_of(a, block);
    const bool starts_with_bias = visible.is_biased && a->D <= MHA_CHAIN && a->score_factor == 1;
    mha_product product = {.rows = visible.keys, .vectors = s->panel.vectors,
                           .a = s->keys ? s->keys : mha_row_at(keys, s->item, s->hkv, block->first),
                           .a_row = s->keys ? (ptrdiff_t)copied_key(a) : mha_stride_of(keys), .a_k = 1,
                           .b = s->queries, .b_k = P, .addend = starts_with_bias ? s->bias : NULL, .addend_row = P,
                           .c = scores, .c_row = P, .prefetch = prefetch};
    mha_multiply_chained(kernels, a->narrow, &product, a->narrow ? mha_divide_up(a->D, a->narrow->group) : a->D);
    if (a->score_factor != 1)
        multiply_scores(a, s, visible.keys, scores);
    if (visible.is_biased && !starts_with_bias)
        kernels->add(scores, scores, s->bias, visible.keys * P);
}

/* Sets the scores of keys that are not visible to -inf. Probabilities are made from the scores of a whole block. */
static void hide_rest(const mha_attention *a, const mha_panel_state *s, const mha_key_block *block,
                      mha_visible visible, char *scores)
{
    const size_t P = s->panel.vectors * a->kernels->lanes;
    a->kernels->fill(scores + visible.keys * P * a->kernels->size, (block->keys - visible.keys) * P, -INFINITY);
}

/* ---- Hidden numbers ----
 *
 * A hidden key has the probability 0, which removes its value, unless its score is NaN or its value is not finite. Then
 * the context of a panel is not finite, and the panel is led over the keys once more, with care: the scores of hidden
 * keys become -inf, and numbers of values that are not finite are added only where their keys are visible. The result
 * has the bits that it has with zeros in hidden keys. */

static void hide_scores(const mha_attention *a, const mha_panel_state *s, mha_visible visible, char *scores)
{
    if (visible.is_biased)
        a->kernels->hide(scores, s->bias, visible.keys * s->panel.vectors * a->kernels->lanes, -INFINITY);
}

mha_product mha_with_finite_values(const mha_kernels *kernels, const mha_product *values, char *finite)
{
    const size_t size = kernels->size, features = values->rows;
    const ptrdiff_t row_bytes = values->a_k * (ptrdiff_t)size;
    mha_product product = *values;
    product.a = finite;
    product.a_k = (ptrdiff_t)features;
    for (size_t key = 0; key < values->depth; key++) {
        char *row = finite + key * features * size;
        memcpy(row, (const char *)values->a + (ptrdiff_t)key * row_bytes, features * size);
        for (size_t i = 0; i < features; i++)
            if (!kernels->is_finite(row + i * size, 1))
                kernels->fill(row + i * size, 1, 0);
    }
    return product;
}

void mha_add_other_values(const mha_kernels *kernels, const mha_product *values, const char *bias)
{
    const size_t size = kernels->size, features = values->rows, lanes = values->b_k;
    const ptrdiff_t row_bytes = values->a_k * (ptrdiff_t)size;
    for (size_t key = 0; key < values->depth; key++) {
        const char *row = (const char *)values->a + (ptrdiff_t)key * row_bytes;
        const char *exps = (const char *)values->b + key * lanes * size;
        const char *of_key = bias ? bias + key * lanes * size : NULL;
        for (size_t i = 0; i < features; i++)
            if (!kernels->is_finite(row + i * size, 1))
                kernels->add_visible((char *)values->c + i * values->c_row * size, exps, row + i * size, of_key, lanes);
    }
}

/* Whether a panel has to be led over the keys once more. */
static bool needs_care(const mha_attention *a, const mha_panel_state *s)
{
    return can_hide(a) && !s->finite && !s->is_empty &&
           !a->kernels->is_finite(s->out, a->Dv * s->panel.vectors * a->kernels->lanes);
}

void mha_score_block(const mha_attention *a, const mha_panel_state *s, const mha_key_block *block, char *scores)
{
    const mha_visible visible = apply_rules(a, s, block);
    if (s->keys && visible.keys > 0)
        copy_keys(a, s, block);
    score(a, s, block, visible, scores, NULL);
    if (a->wanted == MHA_WANT_SCORES || atomic_load_explicit(&a->is_careful, memory_order_relaxed))
        hide_scores(a, s, visible, scores);
    hide_rest(a, s, block, visible, scores);
}

void mha_drop_out(const mha_attention *a, const mha_panel_state *s, const mha_key_block *block, size_t keys,
                  char *probabilities)
{
    const mha_dropout_block dropout = {
        .key = a->rules->dropout_key,
        .threshold = (uint64_t)((1 - a->rules->dropout_p) * 4294967296.0),
        .scale = 1 / (1 - a->rules->dropout_p),
        .n = mha_item_index(a->batch, s->item), .h = s->h, .first_query = s->panel.first,
        .index = block->index, .first_key = block->first_key,
    };
    a->kernels->dropout(probabilities, keys, s->panel.vectors, s->panel.count, &dropout);
}

/* ---- First pass: context ---- */

static void begin(const mha_attention *a, mha_panel_state *s)
{
    mha_pack_queries(a, s);
    a->kernels->softmax_begin(s->maximum, s->sum, s->panel.vectors);
}

/* What the product of this panel prefetches of the next block of x: its share of the rows. The hardware would start too
 * late, or not at all where rows are on different pages. */
static mha_prefetch prefetch_share(const mha_attention *a, const mha_panel_state *s, const mha_rows *x,
                                   const mha_key_block *next, size_t width)
{
    const size_t begin = next->keys * s->share / s->sharers, end = next->keys * (s->share + 1) / s->sharers;
    return (mha_prefetch){mha_row_at(x, s->item, s->hkv, next->first + begin), end - begin,
                          width * mha_size_of(x->type), x->row};
}

/* The product of values and exps. If products are narrow, so are the copied values, of `narrowed` keys. */
static void multiply_values(const mha_attention *a, const mha_panel_state *s, const mha_product *values,
                            size_t narrowed, char *exps)
{
    if (a->narrow) {
        const mha_product product = narrow_exps(a, s, values, narrowed, exps);
        a->narrow->product(&product);
    } else {
        a->kernels->product(values);
    }
}

static void multiply_values_with_care(const mha_attention *a, const mha_panel_state *s, const mha_key_block *block,
                                      const mha_product *values, const char *bias, char *exps)
{
    const mha_product given = a->narrow ? round_values(a, s, block, values) : *values;
    const mha_product product = mha_with_finite_values(a->kernels, &given, s->finite);
    if (a->narrow)
        narrow_values(a, &(wide_rows){s->finite, product.a_k}, product.depth, s->values);
    multiply_values(a, s, &product, product.depth, exps);
    mha_add_other_values(a->kernels, &given, bias);
}

/* Block b of the keys: scores, one step of the online softmax, values. */
static void step(const mha_attention *a, mha_panel_state *s, size_t b, const mha_key_block *block,
                 const mha_key_block *next, mha_visible visible)
{
    const mha_kernels *kernels = a->kernels;
    const size_t P = s->panel.vectors * kernels->lanes;
    char *exps = s->base + a->at.scores, *scores = s->kept ? s->kept + b * mha_block_bytes(a, s->panel.vectors) : exps;
    mha_prefetch prefetch_keys, prefetch_values;
    if (s->kept)
        hide_rest(a, s, block, visible, scores);
    if (visible.keys == 0) /* hidden keys would change nothing: their probability is 0, and the maximum stays */
        return;
    if (next) {
        prefetch_keys = prefetch_share(a, s, keys_of(a, next), next, a->D);
        prefetch_values = prefetch_share(a, s, values_of(a, next), next, a->Dv);
    }
    score(a, s, block, visible, scores, next ? &prefetch_keys : NULL);
    if (s->finite)
        hide_scores(a, s, visible, scores);
    kernels->softmax_step(scores, visible.keys, s->panel.vectors, exps, s->maximum, s->sum, s->factor);
    if (a->rules->dropout_p > 0)
        mha_drop_out(a, s, block, visible.keys, exps);
    const mha_rows *values = values_of(a, block);
    const mha_product product = {.rows = a->Dv, .depth = visible.keys, .vectors = s->panel.vectors,
                                 .a = s->values ? s->values : mha_row_at(values, s->item, s->hkv, block->first),
                                 .a_row = 1, .a_k = s->values ? (ptrdiff_t)copied_value(a) : mha_stride_of(values),
                                 .b = exps, .b_k = P,
                                 .addend = s->is_empty ? NULL : s->out, .addend_row = P, .factor = s->factor,
                                 .c = s->out, .c_row = P, .prefetch = next ? &prefetch_values : NULL};
    if (s->finite)
        multiply_values_with_care(a, s, block, &product, visible.is_biased ? s->bias : NULL, exps);
    else
        multiply_values(a, s, &product, block->keys, exps);
    s->is_empty = false;
}

/* out / sum, in the rows of the panel's queries. */
static void write_context(const mha_attention *a, const mha_panel_state *s, const char *inverse)
{
    const bool is_rounded = has_halves(a);
    char *first = mha_row_at(&a->context, s->item, s->h, s->panel.first), *wide = s->base + a->at.wide;
    a->kernels->unpack_panel(s->out, s->panel.vectors, inverse, s->panel.count, a->Dv, is_rounded ? wide : first,
                             is_rounded ? a->Dv : (size_t)mha_stride_of(&a->context));
    if (is_rounded)
        round_rows(a, &a->context, wide, s->panel.count, a->Dv, first);
}

static void finish(const mha_attention *a, const mha_panel_state *s)
{
    const mha_kernels *kernels = a->kernels;
    char *inverse = s->factor;
    if (s->is_empty)
        kernels->fill(s->out, a->Dv * s->panel.vectors * kernels->lanes, 0);
    kernels->softmax_end(s->sum, inverse, s->panel.vectors, mha_empty_row_of(a));
    write_context(a, s, inverse);
    if (a->wanted) {
        const size_t at = mha_statistics_offset(a, s);
        const size_t bytes = s->panel.vectors * kernels->lanes * kernels->size;
        memcpy(a->maximum + at, s->maximum, bytes);
        memcpy(a->sum + at, s->sum, bytes);
    }
}

static void count_sharers(mha_panel_state *panels, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        panels[i].share = panels[i].sharers = 0;
        for (size_t other = 0; other < count; other++)
            if (panels[other].hkv == panels[i].hkv) {
                panels[i].share += other < i;
                panels[i].sharers++;
            }
    }
}

/* Leads the panels over block b. */
static void attend_block(const mha_attention *a, mha_panel_state *panels, size_t count, size_t b,
                         const mha_key_block *block, const mha_key_block *next)
{
    const bool is_shared = is_mask_shared(a);
    mha_visible visible = {0};
    size_t copied[COPY_HEADS] = {SIZE_MAX, SIZE_MAX}; /* the heads whose keys and values are copied */
    for (size_t i = 0; i < count; i++) {
        mha_panel_state *s = &panels[i];
        /* If the panel before has the same lanes and mask, its bias still stands in the scratch. */
        if (i == 0 || !is_shared || s->panel.first != panels[i - 1].panel.first)
            visible = apply_rules(a, s, block);
        if (s->keys && visible.keys > 0 && copied[s->hkv % COPY_HEADS] != s->hkv) {
            copy_keys(a, s, block);
            copy_values(a, s, block);
            copied[s->hkv % COPY_HEADS] = s->hkv;
        }
        step(a, s, b, block, next, visible);
    }
}

bool mha_attend_panels(mha_attention *a, mha_panel_state *panels, size_t count)
{
    const size_t item = panels[0].item, blocks = mha_key_blocks(a->batch, item);
    if (blocks > 1) /* otherwise no block is prefetched */
        count_sharers(panels, count);
    for (size_t i = 0; i < count; i++)
        begin(a, &panels[i]);
    size_t features = 0; /* since the last poll */
    mha_key_block two[2];
    if (blocks > 0)
        mha_key_block_at(a->batch, item, 0, &two[0]);
    for (size_t b = 0; b < blocks; b++) {
        const mha_key_block *block = &two[b % 2], *next = NULL;
        if (b + 1 < blocks) {
            mha_key_block_at(a->batch, item, b + 1, &two[(b + 1) % 2]);
            next = &two[(b + 1) % 2];
        }
        attend_block(a, panels, count, b, block, next);
        features += a->D + a->Dv;
        if (features >= FEATURES_PER_POLL && mha_is_stopped())
            return false;
        features = features < FEATURES_PER_POLL ? features : 0;
    }
    for (size_t i = 0; i < count; i++) {
        mha_panel_state *s = &panels[i];
        if (!needs_care(a, s)) {
            finish(a, s);
            continue;
        }
        s->finite = s->base + a->at.finite;
        s->is_empty = true;
        atomic_store_explicit(&a->is_careful, true, memory_order_relaxed);
        if (!mha_attend_panels(a, s, 1))
            return false;
    }
    return true;
}

/* Cuts a panel of L queries down to the queries that the item has. */
static mha_panel cut_panel(const mha_attention *a, mha_panel panel, size_t queries)
{
    const size_t left = queries > panel.first ? queries - panel.first : 0;
    if (left < panel.count) {
        panel.count = left;
        panel.vectors = mha_divide_up(left, a->kernels->lanes);
    }
    return panel;
}

static void attend_task(void *context, size_t task, size_t worker)
{
    mha_attention *a = context;
    const mha_attention_tasks *t = &a->tasks;
    mha_panel_state panels[COPY_PANELS];
    /* The last queries come first, because under a causal mask they see the most keys. */
    const size_t part = t->tasks_per_bundle - 1 - task / t->bundles, bundle = task % t->bundles;
    const size_t first_head = bundle * t->heads % a->H, item = bundle * t->heads / a->H;
    const size_t first = part * t->panels;
    const size_t count = mha_smaller(t->panels, t->heads * a->split.panels - first);
    const size_t queries = mha_queries_of(a, item);
    size_t head = first % t->heads, p = first / t->heads, used = 0;
    for (size_t i = 0; i < count; i++) {
        const mha_panel panel = cut_panel(a, mha_panel_at(&a->split, p), queries);
        if (panel.count > 0) {
            mha_set_up_panel(a, worker, used, item, first_head + head, panel, &panels[used]);
            used++;
        }
        if (++head == t->heads) {
            head = 0;
            p++;
        }
    }
    if (used > 0)
        mha_attend_panels(a, panels, used);
}

/* ---- A handful of tokens ---- */

/* Whether items are so small that calling the kernels above would take longer than the arithmetic. */
static bool is_handful(const mha_attention *a)
{
    return !copies_blocks(a) && a->L <= MHA_HANDFUL && a->batch->S <= MHA_HANDFUL && a->D <= MHA_HANDFUL &&
           a->Dv <= MHA_HANDFUL && a->batch->extra == 0 && !can_hide(a) && !a->wanted && !(a->rules->dropout_p > 0);
}

/* The tasks of an item, which share its heads. */
static size_t tasks_of_handful(const mha_attention *a)
{
    const size_t threads = a->team->threads;
    return threads == 1 ? 1 : mha_smaller(a->H, mha_divide_up(TASKS_PER_THREAD * threads, a->batch->count));
}

static void attend_handful_task(void *context, size_t task, size_t worker)
{
    const mha_attention *a = context;
    const size_t tasks = tasks_of_handful(a), item = task / tasks, part = task % tasks;
    mha_handful one = {.queries = mha_queries_of(a, item), .keys = mha_live_keys(a->batch, item), .D = a->D,
                       .Dv = a->Dv, .q_row = mha_stride_of(&a->q), .k_row = mha_stride_of(&a->k),
                       .v_row = mha_stride_of(&a->v), .context_row = mha_stride_of(&a->context),
                       .scale = a->rules->scale, .empty_row = mha_empty_row_of(a)};
    (void)worker;
    for (size_t h = mha_first_of_part(a->H, tasks, part); h < mha_first_of_part(a->H, tasks, part + 1); h++) {
        one.q = mha_row_at(&a->q, item, h, 0);
        one.k = mha_row_at(&a->k, item, h / a->heads_per_kv, 0);
        one.v = mha_row_at(&a->v, item, h / a->heads_per_kv, 0);
        one.context = mha_row_at(&a->context, item, h, 0);
        a->kernels->attend_handful(&one);
    }
}

/* ---- The plan ---- */

static void choose_tasks(mha_attention *a)
{
    mha_attention_tasks *t = &a->tasks;
    t->heads = bundled_heads(a);
    t->bundles = a->batch->count * a->H / t->heads;
    const size_t panels = t->heads * a->split.panels, all = t->bundles * panels;
    t->panels = mha_smaller(max_task_panels(a), mha_divide_up(all, TASKS_PER_THREAD * a->team->threads));
    t->tasks_per_bundle = mha_divide_up(panels, t->panels);
    t->panels = mha_divide_up(panels, t->tasks_per_bundle); /* for example 3 + 3 panels, not 4 + 2 */
}

/* A power of two does not round queries of bfloat16. Scores are multiplied by the rest of the scale. */
static void split_scale(mha_attention *a)
{
    const double scale = a->rules->scale;
    int exponent;
    a->query_scale = scale;
    if (a->narrow && has_halves(a) && isfinite(scale) && scale != 0) {
        frexp(scale, &exponent);
        a->query_scale = ldexp(copysign(0.5, scale), exponent);
    }
    a->score_factor = a->query_scale == scale ? 1 : scale / a->query_scale;
}

size_t mha_plan_attention(mha_attention *a)
{
    atomic_init(&a->is_careful, false);
    a->heads_per_kv = a->H / a->Hkv;
    split_scale(a);
    if (is_handful(a))
        return 0; /* its kernel has what it needs on the stack */
    a->split = mha_split_width(a->kernels, a->L);
    choose_tasks(a);
    mha_plan_panels(a, max_task_panels(a));
    return a->at.layout.bytes;
}

mha_status mha_attend(mha_attention *a)
{
    if (is_handful(a))
        return mha_parallel_for(a->team, a->batch->count * tasks_of_handful(a), attend_handful_task, a);
    return mha_parallel_for(a->team, a->tasks.bundles * a->tasks.tasks_per_bundle, attend_task, a);
}
