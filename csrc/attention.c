/* SPDX-License-Identifier: Apache-2.0
 *
 * attention.c - attention in one pass over the keys. Probabilities are made from its scores, or in a second pass.
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
    MAX_TASK_PANELS = 4,      /* panels that read keys and values, or the mask, together */
    MAX_PANEL_BYTES = 131072, /* of all panels of a task, unless a single panel is larger */
    MAX_KEPT_BYTES = 262144,  /* of the scores that a task keeps, and of the sums of probabilities made from them */
    SEGMENT_BLOCKS = 8,       /* key blocks whose probabilities the second pass collects before it writes them */
    TASKS_PER_THREAD = 4,
    MANY_TASKS_PER_THREAD = 16, /* with so many it matters little that one thread gets one more */
    FEATURES_PER_POLL = 1024,   /* of keys and values that a task reads between two polls */
};

/* What a task holds for one panel. */
typedef struct {
    char *queries;                /* [D][P], scaled */
    char *out;                    /* [Dv][P]; undefined until a block has a visible key */
    char *maximum, *sum, *factor; /* [P] */
    size_t h, hkv;                /* h: query head. hkv: its key/value head. */
    /* sharers: panels of this task with the same hkv. share: the number of this panel among them. */
    size_t share, sharers;
    mha_panel lanes;
    bool is_empty; /* no key was visible so far */
    char *finite;  /* [block][Dv]: a copy of values, with care (see "Hidden numbers"); otherwise NULL */
    char *kept;    /* [keys of all blocks][P]: the scores, if probabilities are made from them; otherwise NULL */
} state;

/* What the probabilities of some key blocks are made with, for one panel of queries. */
typedef struct {
    size_t n, first_head, heads;
    mha_panel lanes;
    bool is_careful; /* see "Hidden numbers" */
    char *queries, *factor;
    char *probabilities; /* [keys of these blocks][P] */
    char *scores;        /* [block][P], of one head */
    char *bias;          /* [block][P]: what masks add to the scores */
    char *rows;          /* [P][block]: transposed probabilities */
} average;

/* Lanes of the widest panel of L queries. */
static size_t widest_panel(const mha_attention *a)
{
    return a->kernels->lanes * mha_smaller(a->split.vectors, a->kernels->vectors);
}

/* Whether a query sees the same keys in all heads. */
static bool is_mask_shared(const mha_attention *a)
{
    return a->rules->attn.kind && a->rules->attn.stride_h == 0;
}

/* The number of heads whose panels are shared out together. They are all heads if they share a mask, because reading a
 * mask costs more than reading keys and values. They are all heads, too, if each has one panel only, because a task
 * would be too small. */
static size_t bundled_heads(const mha_attention *a)
{
    return is_mask_shared(a) || a->split.panels == 1 ? a->H : a->H / a->Hkv;
}

/* Whether a query may see fewer keys than its item has. */
static bool can_hide(const mha_attention *a)
{
    return a->rules->attn.kind || a->rules->padding.kind || a->rules->is_causal;
}

static size_t max_task_panels(const mha_attention *a)
{
    const size_t fit = MAX_PANEL_BYTES / (widest_panel(a) * (a->D + a->Dv) * a->kernels->size);
    const size_t wanted = mha_smaller(MAX_TASK_PANELS, bundled_heads(a) * a->split.panels);
    return fit < 1 ? 1 : mha_smaller(fit, wanted);
}

/* Keys of the largest possible block. S is an upper bound of the live keys of an item. */
static size_t max_block_keys(const mha_attention *a)
{
    return mha_smaller(MHA_BLOCK_KEYS, mha_larger(a->batch->S, a->batch->extra));
}

static size_t max_blocks(const mha_attention *a)
{
    return mha_divide_up(a->batch->S, MHA_BLOCK_KEYS) + (a->batch->extra > 0);
}

/* The number of heads whose probabilities are averaged. */
static size_t averaged_heads(const mha_attention *a)
{
    return a->wanted == MHA_WANT_AVERAGES ? a->H : 1;
}

static size_t averages_of_item(const mha_attention *a)
{
    return a->H / averaged_heads(a);
}

/* Bytes of the scores or probabilities of a block. */
static size_t block_bytes(const mha_attention *a, size_t vectors)
{
    return max_block_keys(a) * vectors * a->kernels->lanes * a->kernels->size;
}

static size_t averages_of_call(const mha_attention *a)
{
    return a->batch->count * averages_of_item(a);
}

/* Panels of the whole call, where a task takes a panel through all heads that are averaged. */
static size_t panels_of_averages(const mha_attention *a)
{
    return averages_of_call(a) * a->split.panels;
}

/* The smallest number of parts from `min` to `max` that gives every thread the same number of tasks. `max` if there is
 * none. */
static size_t even_parts(const mha_attention *a, size_t min, size_t max)
{
    size_t parts = min;
    while (parts < max && averages_of_call(a) * parts % a->team->threads > 0)
        parts++; /* with 11 tasks, one of two threads would wait */
    return parts;
}

/* Whether every thread gets the same number of panels, and equal panels waste at most 40 % of their lanes. */
static bool are_panels_even(const mha_attention *a)
{
    const size_t at_most = mha_divide_up(a->split.vectors, a->split.panels) * a->split.panels;
    return panels_of_averages(a) % a->team->threads == 0 && at_most <= a->split.vectors * 7 / 5;
}

/* The most panels of a task that keeps its scores until probabilities are made from them, so that no score is computed
 * twice. 0: there are too many keys, or too few tasks for the threads. */
static size_t max_kept_panels(const mha_attention *a)
{
    if (!a->wanted || a->wanted == MHA_WANT_SCORES)
        return 0;
    const size_t fitting_blocks = MAX_KEPT_BYTES / (2 * MHA_BLOCK_KEYS * widest_panel(a) * a->kernels->size);
    const size_t fit = fitting_blocks / mha_larger(max_blocks(a), 1);
    if (panels_of_averages(a) < 2 * a->team->threads && !are_panels_even(a))
        return 0;
    return mha_smaller(mha_smaller(MAX_TASK_PANELS, fit), a->split.panels);
}

/* There are as few panels as possible, unless more of them make the tasks even. */
static void split_queries(mha_attention *a)
{
    const mha_split fewest = mha_split_width(a->kernels, a->L);
    a->split = fewest;
    a->kept_panels = max_kept_panels(a);
    if (!a->wanted || a->team->threads == 1 || panels_of_averages(a) >= MANY_TASKS_PER_THREAD * a->team->threads)
        return;
    a->split.panels = even_parts(a, fewest.panels, fewest.vectors);
    if (!are_panels_even(a) || max_kept_panels(a) == 0)
        a->split = fewest;
    a->kept_panels = max_kept_panels(a);
}

/* ---- Scratch ---- */

/* Takes the next piece of a thread's scratch. With base NULL it only counts. */
static char *take(const mha_attention *a, char *base, mha_layout *layout, size_t rows, size_t numbers)
{
    const size_t offset = mha_reserve(layout, rows, numbers, a->kernels->size);
    return base ? base + offset : NULL;
}

/* Plans the scratch of the first pass, and returns its size. */
static size_t plan_scratch(mha_attention *a)
{
    const size_t P = widest_panel(a), keys = max_block_keys(a), size = a->kernels->size;
    const size_t kept_keys = a->kept_panels > 0 ? max_blocks(a) * keys : 0;
    mha_attention_scratch *at = &a->at;
    mha_layout layout = {0}, one = {0};
    at->scores = mha_reserve(&layout, keys, P, size);
    at->bias = mha_reserve(&layout, keys, P, size);
    if (can_hide(a))
        at->values = mha_reserve(&layout, keys, a->Dv, size);
    at->rows = mha_reserve(&layout, a->kept_panels > 0 ? P : 0, MHA_BLOCK_KEYS, size);
    at->states = layout.bytes;
    at->queries = mha_reserve(&one, a->D, P, size);
    at->out = mha_reserve(&one, a->Dv, P, size);
    at->maximum = mha_reserve(&one, 1, P, size);
    at->sum = mha_reserve(&one, 1, P, size);
    at->factor = mha_reserve(&one, 1, P, size);
    at->kept = mha_reserve(&one, kept_keys, P, size);
    at->probabilities = mha_reserve(&one, kept_keys, P, size);
    at->state_bytes = one.bytes;
    mha_reserve(&layout, a->kept_panels > 0 ? a->kept_panels : max_task_panels(a), one.bytes, 1);
    return layout.bytes;
}

static char *memory_of_state(const mha_attention_scratch *at, char *scratch, size_t i)
{
    return scratch + at->states + i * at->state_bytes;
}

/* The state is filled in where it stays: a copy would wait for the stores to reach the cache. */
static void set_up_state(const mha_attention_scratch *at, char *scratch, size_t i, state *s)
{
    char *base = memory_of_state(at, scratch, i);
    s->queries = base + at->queries;
    s->out = base + at->out;
    s->maximum = base + at->maximum;
    s->sum = base + at->sum;
    s->factor = base + at->factor;
    s->is_empty = true;
    s->finite = NULL;
    s->kept = NULL;
}

/* Takes room for the probabilities of some blocks, and for one block of one head. */
static void take_average(const mha_attention *a, char *base, mha_layout *layout, average *w)
{
    const size_t P = widest_panel(a), keys = max_block_keys(a);
    w->queries = take(a, base, layout, a->D, P);
    w->factor = take(a, base, layout, 1, P);
    w->probabilities = take(a, base, layout, mha_smaller(SEGMENT_BLOCKS, max_blocks(a)) * keys, P);
    w->scores = take(a, base, layout, keys, P);
    w->bias = take(a, base, layout, keys, P);
    w->rows = take(a, base, layout, P, MHA_BLOCK_KEYS);
}

static size_t statistics_of_a_head(const mha_attention *a)
{
    return a->split.vectors * a->kernels->lanes;
}

static size_t statistics_offset(const mha_attention *a, size_t n, size_t h, mha_panel lanes)
{
    return ((n * a->H + h) * statistics_of_a_head(a) + lanes.first) * a->kernels->size;
}

/* ---- Scores of one panel against one block, shared by both passes ---- */

static void pack_queries(const mha_attention *a, size_t n, size_t h, mha_panel lanes, char *queries)
{
    a->kernels->pack_panel(mha_row_at(&a->q, n, h, lanes.first), (size_t)mha_row_numbers(&a->q), lanes.count, a->D,
                           a->rules->scale, queries, lanes.vectors);
}

static const mha_rows *keys_of(const mha_attention *a, const mha_key_block *block)
{
    return block->is_extra ? &a->extra_k : &a->k;
}

static const mha_rows *values_of(const mha_attention *a, const mha_key_block *block)
{
    return block->is_extra ? &a->extra_v : &a->v;
}

static mha_visible apply_rules(const mha_attention *a, size_t n, size_t h, mha_panel lanes, const mha_key_block *block,
                               char *bias)
{
    const mha_lanes of_head = {h, 1, lanes.first, lanes.count, lanes.vectors};
    return mha_apply_rules(a->kernels, a->rules, mha_number_of(a->batch, n), &of_head, block, bias);
}

/* scores[key][lane] of the visible keys. The bias is added last, if there is one. Chains have at most MHA_CHAIN
 * features, as in projections. */
static void score(const mha_attention *a, size_t n, size_t hkv, mha_panel lanes, const mha_key_block *block,
                  mha_visible visible, const char *queries, const char *bias, char *scores,
                  const mha_prefetch *prefetch)
{
    const mha_kernels *kernels = a->kernels;
    const size_t P = lanes.vectors * kernels->lanes;
    const mha_rows *keys = keys_of(a, block);
    mha_product product = {.rows = visible.keys, .vectors = lanes.vectors, .a = mha_row_at(keys, n, hkv, block->first),
                           .a_row = mha_row_numbers(keys), .a_k = 1, .b = queries, .b_k = P,
                           .addend = visible.is_biased && a->D <= MHA_CHAIN ? bias : NULL, .addend_row = P,
                           .c = scores, .c_row = P, .prefetch = prefetch};
    mha_multiply_chained(kernels, &product, a->D);
    if (visible.is_biased && a->D > MHA_CHAIN)
        kernels->accumulate(scores, bias, visible.keys * P);
}

/* Sets the scores of keys that are not visible to -inf. Weights are made from the scores of a whole block. */
static void hide_rest(const mha_attention *a, mha_panel lanes, const mha_key_block *block, mha_visible visible,
                      char *scores)
{
    const size_t P = lanes.vectors * a->kernels->lanes;
    a->kernels->fill(scores + visible.keys * P * a->kernels->size, (block->keys - visible.keys) * P, -INFINITY);
}

/* Applies dropout to the probabilities of the first `keys` keys of a block. */
static void drop_out(const mha_attention *a, size_t n, size_t h, mha_panel lanes, const mha_key_block *block,
                     size_t keys, char *probabilities)
{
    const mha_dropout_block dropout = {
        .key = a->rules->dropout_key,
        .threshold = (uint64_t)((1 - a->rules->dropout_p) * 4294967296.0),
        .scale = 1 / (1 - a->rules->dropout_p),
        .n = mha_number_of(a->batch, n), .h = h, .first_query = lanes.first,
        .index = block->index, .first_key = block->first_key,
    };
    a->kernels->dropout(probabilities, keys, lanes.vectors, lanes.count, &dropout);
}

/* ---- Hidden numbers ----
 *
 * A hidden key has the probability 0, which removes its value, unless its score is NaN or its value is not finite. Then
 * the context of a panel is not finite, and the panel is led over the keys once more, with care: the scores of hidden
 * keys become -inf, and numbers of values that are not finite are added only where their keys are visible. The result
 * has the bits that it has with zeros in hidden keys. */

static void hide_scores(const mha_attention *a, mha_panel lanes, mha_visible visible, const char *bias, char *scores)
{
    if (visible.is_biased)
        a->kernels->hide(scores, bias, visible.keys * lanes.vectors * a->kernels->lanes, -INFINITY);
}

void mha_add_values_with_care(const mha_kernels *kernels, const mha_product *values, const char *bias, char *finite)
{
    const size_t size = kernels->size, features = values->rows, lanes = values->b_k;
    mha_product product = *values;
    product.a = finite;
    product.a_k = (ptrdiff_t)features;
    for (size_t key = 0; key < values->depth; key++) {
        const char *row = (const char *)values->a + (ptrdiff_t)key * values->a_k * (ptrdiff_t)size;
        memcpy(finite + key * features * size, row, features * size);
        for (size_t i = key * features; i < (key + 1) * features; i++)
            if (!kernels->is_finite(finite + i * size, 1))
                kernels->fill(finite + i * size, 1, 0);
    }
    kernels->product(&product);
    for (size_t key = 0; key < values->depth; key++) {
        const char *row = (const char *)values->a + (ptrdiff_t)key * values->a_k * (ptrdiff_t)size;
        const char *exps = (const char *)values->b + key * lanes * size;
        for (size_t i = 0; i < features; i++)
            if (!kernels->is_finite(row + i * size, 1))
                kernels->add_visible((char *)values->c + i * values->c_row * size, exps, row + i * size,
                                     bias ? bias + key * lanes * size : NULL, lanes);
    }
}

/* Whether a panel has to be led over the keys once more. */
static bool needs_care(const mha_attention *a, const state *s)
{
    return can_hide(a) && !s->finite && !s->is_empty &&
           !a->kernels->is_finite(s->out, a->Dv * s->lanes.vectors * a->kernels->lanes);
}

/* ---- First pass: context ---- */

static void begin(const mha_attention *a, size_t n, state *s)
{
    pack_queries(a, n, s->h, s->lanes, s->queries);
    a->kernels->softmax_begin(s->maximum, s->sum, s->lanes.vectors);
}

/* What the product of this panel prefetches of the next block of x: its share of the rows. The hardware would start too
 * late, or not at all where rows are on different pages. */
static mha_prefetch prefetch_share(const mha_attention *a, const state *s, const mha_rows *x, size_t n,
                                   const mha_key_block *next, size_t width)
{
    const size_t begin = next->keys * s->share / s->sharers, end = next->keys * (s->share + 1) / s->sharers;
    return (mha_prefetch){mha_row_at(x, n, s->hkv, next->first + begin), end - begin, width * a->kernels->size, x->row};
}

static void step(const mha_attention *a, size_t n, state *s, const mha_key_block *block, const mha_key_block *next,
                 mha_visible visible, char *scores, char *exps, const char *bias)
{
    const mha_kernels *kernels = a->kernels;
    const size_t P = s->lanes.vectors * kernels->lanes;
    mha_prefetch prefetch_keys, prefetch_values;
    if (s->kept)
        hide_rest(a, s->lanes, block, visible, scores);
    if (visible.keys == 0) /* hidden keys would change nothing: their probability is 0, and the maximum stays */
        return;
    if (next) {
        prefetch_keys = prefetch_share(a, s, keys_of(a, next), n, next, a->D);
        prefetch_values = prefetch_share(a, s, values_of(a, next), n, next, a->Dv);
    }
    score(a, n, s->hkv, s->lanes, block, visible, s->queries, bias, scores, next ? &prefetch_keys : NULL);
    if (s->finite)
        hide_scores(a, s->lanes, visible, bias, scores);
    kernels->softmax_step(scores, visible.keys, s->lanes.vectors, exps, s->maximum, s->sum, s->factor);
    if (a->rules->dropout_p > 0)
        drop_out(a, n, s->h, s->lanes, block, visible.keys, exps);
    const mha_rows *values = values_of(a, block);
    const mha_product product = {.rows = a->Dv, .depth = visible.keys, .vectors = s->lanes.vectors,
                                 .a = mha_row_at(values, n, s->hkv, block->first), .a_row = 1,
                                 .a_k = mha_row_numbers(values), .b = exps, .b_k = P,
                                 .addend = s->is_empty ? NULL : s->out, .addend_row = P, .factor = s->factor,
                                 .c = s->out, .c_row = P, .prefetch = next ? &prefetch_values : NULL};
    if (s->finite)
        mha_add_values_with_care(kernels, &product, visible.is_biased ? bias : NULL, s->finite);
    else
        kernels->product(&product);
    s->is_empty = false;
}

static void finish(const mha_attention *a, size_t n, const state *s)
{
    const mha_kernels *kernels = a->kernels;
    char *inverse = s->factor;
    /* An item without any key gives 0, as in torch. NaN is for keys that are all hidden. */
    const mha_empty_row empty_row = a->batch->S + a->batch->extra > 0 ? a->rules->empty_row : MHA_EMPTY_ROW_ZERO;
    if (s->is_empty)
        kernels->fill(s->out, a->Dv * s->lanes.vectors * kernels->lanes, 0);
    kernels->softmax_end(s->sum, inverse, s->lanes.vectors, empty_row);
    kernels->unpack_panel(s->out, s->lanes.vectors, inverse, s->lanes.count, a->Dv,
                          mha_row_at(&a->context, n, s->h, s->lanes.first), (size_t)mha_row_numbers(&a->context));
    if (a->wanted) {
        const size_t at = statistics_offset(a, n, s->h, s->lanes);
        const size_t bytes = s->lanes.vectors * kernels->lanes * kernels->size;
        memcpy(a->maximum + at, s->maximum, bytes);
        memcpy(a->sum + at, s->sum, bytes);
    }
}

static void count_sharers(state *states, size_t panels)
{
    for (size_t i = 0; i < panels; i++) {
        states[i].share = states[i].sharers = 0;
        for (size_t other = 0; other < panels; other++)
            if (states[other].hkv == states[i].hkv) {
                states[i].share += other < i;
                states[i].sharers++;
            }
    }
}

/* Leads some panels together over the keys of their heads. Returns false if the call is to be stopped. */
static bool attend(mha_attention *a, size_t n, state *states, size_t panels, char *scratch)
{
    const size_t blocks = mha_key_blocks(a->batch, n);
    char *exps = scratch + a->at.scores, *bias = scratch + a->at.bias;
    if (blocks > 1) /* otherwise no block is prefetched */
        count_sharers(states, panels);
    for (size_t i = 0; i < panels; i++)
        begin(a, n, &states[i]);
    const bool is_shared = is_mask_shared(a);
    size_t features = 0; /* since the last poll */
    mha_key_block two[2];
    if (blocks > 0)
        mha_key_block_at(a->batch, n, 0, &two[0]);
    for (size_t b = 0; b < blocks; b++) {
        const mha_key_block *block = &two[b % 2], *next = NULL;
        if (b + 1 < blocks) {
            mha_key_block_at(a->batch, n, b + 1, &two[(b + 1) % 2]);
            next = &two[(b + 1) % 2];
        }
        mha_visible visible = {0};
        for (size_t i = 0; i < panels; i++) {
            state *s = &states[i];
            if (i == 0 || !is_shared || s->lanes.first != states[i - 1].lanes.first)
                visible = apply_rules(a, n, s->h, s->lanes, block, bias);
            char *scores = s->kept ? s->kept + b * block_bytes(a, s->lanes.vectors) : exps;
            step(a, n, s, block, next, visible, scores, exps, bias);
        }
        features += a->D + a->Dv;
        if (features >= FEATURES_PER_POLL && mha_is_stopped())
            return false;
        features = features < FEATURES_PER_POLL ? features : 0;
    }
    for (size_t i = 0; i < panels; i++) {
        state *s = &states[i];
        if (!needs_care(a, s)) {
            finish(a, n, s);
            continue;
        }
        s->finite = scratch + a->at.values;
        s->is_empty = true;
        atomic_store_explicit(&a->is_careful, true, memory_order_relaxed);
        if (!attend(a, n, s, 1, scratch))
            return false;
    }
    return true;
}

static void attend_task(void *context, size_t task, size_t worker)
{
    mha_attention *a = context;
    char *base = mha_scratch_of(a->team, worker);
    state states[MAX_TASK_PANELS];
    /* The last queries come first, because under a causal mask they see the most keys. */
    const size_t group = a->groups - 1 - task / a->bundles, bundle = task % a->bundles;
    const size_t first_head = bundle * a->heads % a->H, n = bundle * a->heads / a->H;
    const size_t first = group * a->task_panels;
    const size_t panels = mha_smaller(a->task_panels, a->heads * a->split.panels - first);
    size_t head = first % a->heads, panel = first / a->heads;
    for (size_t i = 0; i < panels; i++) {
        set_up_state(&a->at, base, i, &states[i]);
        states[i].h = first_head + head;
        states[i].hkv = states[i].h / (a->H / a->Hkv);
        states[i].lanes = mha_panel_at(&a->split, panel);
        if (++head == a->heads) {
            head = 0;
            panel++;
        }
    }
    attend(a, n, states, panels, base);
}

/* ---- Probabilities ----
 *
 * Once maximum and sum are known, scores become probabilities. The probabilities of all heads are added in order, so
 * that a matrix (N, H, L, S) does not exist where averages are wanted. The scores are those that the first pass kept.
 * If it could not keep them, a second pass computes them again, to the same bits. */

/* Turns scores of one head and block into probabilities, and adds them to the probabilities of the heads before, unless
 * both are the same array. If scores are wanted, they stay as they are. */
static void add_probabilities(const mha_attention *a, const average *w, size_t h, const mha_key_block *block,
                              char *scores, char *probabilities)
{
    const mha_kernels *kernels = a->kernels;
    if (a->wanted == MHA_WANT_SCORES)
        return;
    const size_t at = statistics_offset(a, w->n, h, w->lanes);
    kernels->softmax_probabilities(scores, block->keys, w->lanes.vectors, a->maximum + at, a->sum + at);
    if (a->rules->dropout_p > 0)
        drop_out(a, w->n, h, w->lanes, block, block->keys, scores);
    if (scores != probabilities)
        kernels->accumulate(probabilities, scores, block->keys * w->lanes.vectors * kernels->lanes);
}

/* Computes the scores of one head and block again. Keys that are not visible get -inf. */
static void score_again(const mha_attention *a, const average *w, size_t h, const mha_key_block *block, char *scores)
{
    const mha_visible visible = apply_rules(a, w->n, h, w->lanes, block, w->bias);
    score(a, w->n, h / (a->H / a->Hkv), w->lanes, block, visible, w->queries, w->bias, scores, NULL);
    if (w->is_careful)
        hide_scores(a, w->lanes, visible, w->bias, scores);
    hide_rest(a, w->lanes, block, visible, scores);
}

static char *probabilities_row(const mha_attention *a, const average *w, size_t lane)
{
    return mha_row_at(&a->probabilities, w->n, w->first_head / w->heads, w->lanes.first + lane);
}

static void write_probabilities(const mha_attention *a, const average *w, const mha_key_block *block,
                                const char *probabilities)
{
    const mha_kernels *kernels = a->kernels;
    const size_t size = kernels->size;
    if (!block->index) {
        kernels->unpack_panel(probabilities, w->lanes.vectors, w->factor, w->lanes.count, block->keys,
                              probabilities_row(a, w, 0) + block->first_key * size, (size_t)mha_row_numbers(&a->probabilities));
        return;
    }
    kernels->unpack_panel(probabilities, w->lanes.vectors, w->factor, w->lanes.count, block->keys, w->rows,
                          MHA_BLOCK_KEYS);
    for (size_t lane = 0; lane < w->lanes.count; lane++)
        for (size_t i = 0; i < block->keys; i++)
            memcpy(probabilities_row(a, w, lane) + block->index[i] * size, w->rows + (lane * MHA_BLOCK_KEYS + i) * size,
                   size);
}

/* Writes the columns of keys that are not live. They are all equal, so one column is computed. Its score is -inf. Its
 * probability is 0, or NaN if the query sees no key. w->probabilities is overwritten. */
static void write_removed(const mha_attention *a, const average *w)
{
    const mha_kernels *kernels = a->kernels;
    const mha_key_block one = {.keys = 1};
    for (size_t h = w->first_head; h < w->first_head + w->heads; h++) {
        char *scores = h == w->first_head ? w->probabilities : w->scores;
        kernels->fill(scores, w->lanes.vectors * kernels->lanes, -INFINITY);
        add_probabilities(a, w, h, &one, scores, w->probabilities);
    }
    kernels->unpack_panel(w->probabilities, w->lanes.vectors, w->factor, w->lanes.count, 1, w->rows, 1);
    for (size_t s = mha_next_removed(a->batch, w->n, 0); s < a->batch->S; s = mha_next_removed(a->batch, w->n, s + 1))
        for (size_t lane = 0; lane < w->lanes.count; lane++)
            memcpy(probabilities_row(a, w, lane) + s * kernels->size, w->rows + lane * kernels->size, kernels->size);
}

/* Writes the probabilities of blocks `first` to `end`. The columns of keys that are not live are written with the first
 * block. */
static void write_blocks(const mha_attention *a, const average *w, size_t first, size_t end)
{
    a->kernels->fill(w->factor, w->lanes.vectors * a->kernels->lanes, 1 / (double)w->heads);
    for (size_t b = first; b < end; b++) {
        mha_key_block block;
        mha_key_block_at(a->batch, w->n, b, &block);
        write_probabilities(a, w, &block, w->probabilities + (b - first) * block_bytes(a, w->lanes.vectors));
    }
    if (first == 0 && a->batch->index)
        write_removed(a, w);
}

/* Takes some panels of an item through all heads that are averaged: their context, then their probabilities. */
static void attend_and_write_task(void *context, size_t task, size_t worker)
{
    mha_attention *a = context;
    char *base = mha_scratch_of(a->team, worker), *scores = base + a->at.scores;
    const size_t heads = averaged_heads(a), averages = averages_of_call(a);
    const size_t n = task % averages / averages_of_item(a);
    const size_t first_head = task % averages % averages_of_item(a) * heads;
    const size_t group = a->groups - 1 - task / averages, first = group * a->split.panels / a->groups;
    const size_t panels = (group + 1) * a->split.panels / a->groups - first, blocks = mha_key_blocks(a->batch, n);
    state states[MAX_TASK_PANELS];
    average w[MAX_TASK_PANELS];
    for (size_t i = 0; i < panels; i++) {
        char *memory = memory_of_state(&a->at, base, i);
        w[i] = (average){.n = n, .first_head = first_head, .heads = heads,
                         .lanes = mha_panel_at(&a->split, first + i), .factor = memory + a->at.factor,
                         .probabilities = memory + a->at.probabilities, .scores = scores, .rows = base + a->at.rows};
    }
    for (size_t h = first_head; h < first_head + heads; h++) {
        for (size_t i = 0; i < panels; i++) {
            set_up_state(&a->at, base, i, &states[i]);
            states[i].h = h;
            states[i].hkv = h / (a->H / a->Hkv);
            states[i].lanes = w[i].lanes;
            states[i].kept = h == first_head ? w[i].probabilities : memory_of_state(&a->at, base, i) + a->at.kept;
        }
        if (!attend(a, n, states, panels, base))
            return;
        for (size_t b = 0; b < blocks; b++) {
            mha_key_block block;
            mha_key_block_at(a->batch, n, b, &block);
            for (size_t i = 0; i < panels; i++) {
                const size_t at = b * block_bytes(a, states[i].lanes.vectors);
                add_probabilities(a, &w[i], h, &block, states[i].kept + at, w[i].probabilities + at);
            }
        }
    }
    for (size_t i = 0; i < panels; i++)
        write_blocks(a, &w[i], 0, blocks);
}

static void second_pass_task(void *context, size_t task, size_t worker)
{
    const mha_attention *a = context;
    char *base = mha_scratch_of(a->team, worker);
    mha_layout layout = {0};
    const size_t heads = averaged_heads(a);
    const size_t segment = task % a->segments, panel = task / a->segments;
    average w = {
        .n = panel / a->split.panels / averages_of_item(a),
        .first_head = panel / a->split.panels % averages_of_item(a) * heads,
        .heads = heads,
        .lanes = mha_panel_at(&a->split, panel % a->split.panels),
        .is_careful = a->wanted == MHA_WANT_SCORES || atomic_load_explicit(&a->is_careful, memory_order_relaxed),
    };
    take_average(a, base, &layout, &w);
    const size_t first = segment * SEGMENT_BLOCKS;
    const size_t end = mha_smaller(first + SEGMENT_BLOCKS, mha_key_blocks(a->batch, w.n));
    for (size_t h = w.first_head; h < w.first_head + heads; h++) {
        pack_queries(a, w.n, h, w.lanes, w.queries);
        for (size_t b = first; b < end; b++) {
            mha_key_block block;
            mha_key_block_at(a->batch, w.n, b, &block);
            char *probabilities = w.probabilities + (b - first) * block_bytes(a, w.lanes.vectors);
            char *scores = h == w.first_head ? probabilities : w.scores;
            score_again(a, &w, h, &block, scores);
            add_probabilities(a, &w, h, &block, scores, probabilities);
        }
    }
    write_blocks(a, &w, first, end);
}

/* ---- Both passes ---- */

static void choose_tasks(mha_attention *a)
{
    const size_t threads = a->team->threads;
    if (a->kept_panels > 0) {
        const size_t panels = a->split.panels;
        const size_t wanted = mha_divide_up(panels_of_averages(a), TASKS_PER_THREAD * threads);
        a->groups = even_parts(a, mha_divide_up(panels, mha_smaller(a->kept_panels, wanted)), panels);
        return;
    }
    a->heads = bundled_heads(a);
    a->bundles = a->batch->count * a->H / a->heads;
    const size_t panels = a->heads * a->split.panels;
    a->task_panels = mha_smaller(max_task_panels(a), mha_divide_up(a->bundles * panels, TASKS_PER_THREAD * threads));
    a->groups = mha_divide_up(panels, a->task_panels);
    a->task_panels = mha_divide_up(panels, a->groups); /* for example 3 + 3 panels, not 4 + 2 */
    a->segments = mha_divide_up(max_blocks(a), SEGMENT_BLOCKS);
}

size_t mha_plan_attention(mha_attention *a, mha_plan *plan)
{
    mha_layout second = {0};
    split_queries(a);
    choose_tasks(a);
    const size_t first_pass = plan_scratch(a);
    if (a->wanted) {
        const size_t statistics = a->batch->count * a->H * statistics_of_a_head(a);
        mha_place(plan, &a->maximum, statistics, 1, a->kernels->size);
        mha_place(plan, &a->sum, statistics, 1, a->kernels->size);
        if (a->kept_panels == 0)
            take_average(a, NULL, &second, &(average){0});
    }
    return mha_larger(first_pass, second.bytes);
}

mha_status mha_attend(mha_attention *a)
{
    atomic_init(&a->is_careful, false);
    if (a->kept_panels > 0)
        return mha_parallel_for(a->team, averages_of_call(a) * a->groups, attend_and_write_task, a);
    mha_status status = MHA_OK;
    if (a->wanted != MHA_WANT_SCORES)
        status = mha_parallel_for(a->team, a->bundles * a->groups, attend_task, a);
    if (status != MHA_OK || !a->wanted)
        return status;
    return mha_parallel_for(a->team, panels_of_averages(a) * a->segments, second_pass_task, a);
}
