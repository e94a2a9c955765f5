/* SPDX-License-Identifier: Apache-2.0
 *
 * probabilities.c - the probabilities beside the context.
 *
 * Once maximum and sum are known, scores become probabilities. The probabilities of all heads are added in order, so
 * that a matrix (N, H, L, S) does not exist where averages are wanted. The scores are those that the pass over the keys
 * kept. If it could not keep them, a second pass computes them again, to the same bits.
 *
 * Owns: the order in which heads are added.
 */
#include "probabilities.h"

#include <math.h>
#include <string.h>

enum {
    MAX_KEPT_BYTES = 262144, /* of the scores that a task keeps, and of the sums of probabilities made from them */
    SEGMENT_BLOCKS = 8,      /* key blocks whose probabilities the second pass collects before it writes them */
    TASKS_PER_THREAD = 4,
    MANY_TASKS_PER_THREAD = 16, /* with this many, it matters little if one thread gets one more */
};

/* ---- Tasks ---- */

/* The number of heads whose probabilities are averaged. */
static size_t averaged_heads(const mha_attention *a)
{
    return a->wanted == MHA_WANT_AVERAGES ? a->H : 1;
}

static size_t averages_of_item(const mha_attention *a)
{
    return a->H / averaged_heads(a);
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

/* Whether every thread gets the same number of panels, and equal panels have at most 40 % more lanes than are
 * needed. */
static bool are_panels_even(const mha_attention *a)
{
    const size_t at_most = mha_divide_up(a->split.vectors, a->split.panels) * a->split.panels;
    return panels_of_averages(a) % a->team->threads == 0 && at_most <= a->split.vectors * 7 / 5;
}

/* The most panels of a task that keeps its scores until probabilities are made from them, so that no score is computed
 * twice. 0: there are too many keys, or too few tasks for the threads. */
static size_t max_kept_panels(const mha_attention *a)
{
    if (a->wanted == MHA_WANT_SCORES)
        return 0;
    const size_t fitting_blocks = MAX_KEPT_BYTES / (2 * MHA_BLOCK_KEYS * mha_widest_panel(a) * a->kernels->size);
    const size_t fit = fitting_blocks / mha_larger(mha_max_blocks(a), 1);
    if (panels_of_averages(a) < 2 * a->team->threads && !are_panels_even(a))
        return 0;
    return mha_smaller(mha_smaller(MHA_MAX_TASK_PANELS, fit), a->split.panels);
}

/* There are as few panels as possible, unless more of them make the tasks even. If scores are not kept, the split stays
 * as mha_plan_attention() made it. */
static void split_queries(mha_attention *a)
{
    const mha_split fewest = a->split;
    a->tasks.kept_panels = max_kept_panels(a);
    if (a->team->threads == 1 || panels_of_averages(a) >= MANY_TASKS_PER_THREAD * a->team->threads)
        return;
    a->split.panels = even_parts(a, fewest.panels, fewest.vectors);
    if (!are_panels_even(a) || max_kept_panels(a) == 0)
        a->split = fewest;
    a->tasks.kept_panels = max_kept_panels(a);
}

/* ---- Scores become probabilities ----
 *
 * The probabilities of the heads that are averaged are added up as panels [keys of some blocks][P]. Then the state of
 * the last head's panel says where they belong. */

/* Turns scores of one head and block into probabilities, and adds them to the probabilities of the heads before, unless
 * both are the same array. If scores are wanted, they stay as they are. */
static void add_probabilities(const mha_attention *a, const mha_panel_state *s, const mha_key_block *block,
                              char *scores, char *probabilities)
{
    const mha_kernels *kernels = a->kernels;
    if (a->wanted == MHA_WANT_SCORES)
        return;
    const size_t at = mha_statistics_offset(a, s);
    kernels->softmax_probabilities(scores, block->keys, s->panel.vectors, a->maximum + at, a->sum + at);
    if (a->rules->dropout_p > 0)
        mha_drop_out(a, s, block, block->keys, scores);
    if (scores != probabilities)
        kernels->add(probabilities, probabilities, scores, block->keys * s->panel.vectors * kernels->lanes);
}

static char *probabilities_row(const mha_attention *a, const mha_panel_state *s, size_t lane)
{
    return mha_row_at(&a->probabilities, s->item, s->h / averaged_heads(a), s->panel.first + lane);
}

static void write_probabilities(const mha_attention *a, const mha_panel_state *s, const mha_key_block *block,
                                const char *probabilities)
{
    const mha_kernels *kernels = a->kernels;
    const size_t size = kernels->size;
    char *rows = s->base + a->at.rows;
    if (!block->index) {
        kernels->unpack_panel(probabilities, s->panel.vectors, s->factor, s->panel.count, block->keys,
                              probabilities_row(a, s, 0) + block->first_key * size,
                              (size_t)mha_stride_of(&a->probabilities));
        return;
    }
    kernels->unpack_panel(probabilities, s->panel.vectors, s->factor, s->panel.count, block->keys, rows,
                          MHA_BLOCK_KEYS);
    for (size_t lane = 0; lane < s->panel.count; lane++)
        for (size_t i = 0; i < block->keys; i++)
            memcpy(probabilities_row(a, s, lane) + block->index[i] * size, rows + (lane * MHA_BLOCK_KEYS + i) * size,
                   size);
}

/* Writes the columns of keys that are not live. They are all equal, so one column is computed, in the place of
 * `probabilities`. Its score is -inf. Its probability is 0, or NaN if the query sees no key. */
static void write_removed(const mha_attention *a, const mha_panel_state *s, char *probabilities)
{
    const mha_kernels *kernels = a->kernels;
    const mha_key_block one = {.keys = 1};
    const size_t size = kernels->size, first_head = s->h + 1 - averaged_heads(a);
    mha_panel_state of_head = *s;
    for (of_head.h = first_head; of_head.h <= s->h; of_head.h++) {
        char *scores = of_head.h == first_head ? probabilities : s->base + a->at.scores;
        kernels->fill(scores, s->panel.vectors * kernels->lanes, -INFINITY);
        add_probabilities(a, &of_head, &one, scores, probabilities);
    }
    char *column = s->base + a->at.rows;
    kernels->unpack_panel(probabilities, s->panel.vectors, s->factor, s->panel.count, 1, column, 1);
    for (size_t key = mha_next_removed(a->batch, s->item, 0); key < a->batch->S;
         key = mha_next_removed(a->batch, s->item, key + 1))
        for (size_t lane = 0; lane < s->panel.count; lane++)
            memcpy(probabilities_row(a, s, lane) + key * size, column + lane * size, size);
}

/* Writes the probabilities of blocks `first` to `end`. The columns of keys that are not live are written with the first
 * block. */
static void write_blocks(const mha_attention *a, const mha_panel_state *s, size_t first, size_t end,
                         char *probabilities)
{
    a->kernels->fill(s->factor, s->panel.vectors * a->kernels->lanes, 1 / (double)averaged_heads(a));
    for (size_t b = first; b < end; b++) {
        mha_key_block block;
        mha_key_block_at(a->batch, s->item, b, &block);
        write_probabilities(a, s, &block, probabilities + (b - first) * mha_block_bytes(a, s->panel.vectors));
    }
    if (first == 0 && a->batch->index)
        write_removed(a, s, probabilities);
}

/* ---- Both at once: scores are kept ---- */

/* Where the probabilities of panel i of a task are added up. The scores that are kept follow. */
static char *kept_probabilities(const mha_attention *a, size_t worker, size_t i)
{
    return mha_scratch_of(a->team, worker) + a->at.kept + i * a->at.kept_bytes;
}

static void add_kept(const mha_attention *a, const mha_panel_state *s, char *probabilities)
{
    for (size_t b = 0; b < mha_key_blocks(a->batch, s->item); b++) {
        mha_key_block block;
        mha_key_block_at(a->batch, s->item, b, &block);
        const size_t at = b * mha_block_bytes(a, s->panel.vectors);
        add_probabilities(a, s, &block, s->kept + at, probabilities + at);
    }
}

/* Takes some panels of an item through all heads that are averaged: their context, then their probabilities. */
static void attend_and_write_task(void *context, size_t task, size_t worker)
{
    mha_attention *a = context;
    const size_t heads = averaged_heads(a), averages = averages_of_call(a);
    const size_t item = task % averages / averages_of_item(a);
    const size_t first_head = task % averages % averages_of_item(a) * heads;
    const size_t tasks = a->tasks.kept_tasks, part = tasks - 1 - task / averages;
    const size_t first = part * a->split.panels / tasks, count = (part + 1) * a->split.panels / tasks - first;
    mha_panel_state panels[MHA_MAX_TASK_PANELS];
    for (size_t h = first_head; h < first_head + heads; h++) {
        for (size_t i = 0; i < count; i++) {
            mha_set_up_panel(a, worker, i, item, h, mha_panel_at(&a->split, first + i), &panels[i]);
            panels[i].kept = kept_probabilities(a, worker, i) + (h == first_head ? 0 : a->at.kept_bytes / 2);
        }
        if (!mha_attend_panels(a, panels, count))
            return;
        for (size_t i = 0; i < count; i++)
            add_kept(a, &panels[i], kept_probabilities(a, worker, i));
    }
    for (size_t i = 0; i < count; i++)
        write_blocks(a, &panels[i], 0, mha_key_blocks(a->batch, item), kept_probabilities(a, worker, i));
}

/* ---- Afterwards: scores are computed again ---- */

static void second_pass_task(void *context, size_t task, size_t worker)
{
    const mha_attention *a = context;
    const size_t heads = averaged_heads(a), segment = task % a->tasks.segments, p = task / a->tasks.segments;
    const size_t item = p / a->split.panels / averages_of_item(a);
    const size_t first_head = p / a->split.panels % averages_of_item(a) * heads;
    const size_t first = segment * SEGMENT_BLOCKS;
    const size_t end = mha_smaller(first + SEGMENT_BLOCKS, mha_key_blocks(a->batch, item));
    char *base = mha_scratch_of(a->team, worker), *probabilities = base + a->at.probabilities;
    const mha_panel panel = mha_panel_at(&a->split, p % a->split.panels);
    mha_panel_state s;
    for (size_t h = first_head; h < first_head + heads; h++) {
        mha_set_up_panel(a, worker, 0, item, h, panel, &s);
        mha_pack_queries(a, &s);
        for (size_t b = first; b < end; b++) {
            mha_key_block block;
            mha_key_block_at(a->batch, item, b, &block);
            char *of_block = probabilities + (b - first) * mha_block_bytes(a, s.panel.vectors);
            char *scores = h == first_head ? of_block : base + a->at.scores;
            mha_score_block(a, &s, &block, scores);
            add_probabilities(a, &s, &block, scores, of_block);
        }
    }
    write_blocks(a, &s, first, end, probabilities);
}

/* ---- The plan ---- */

/* Plans the scratch of tasks that keep their scores. */
static void plan_kept(mha_attention *a)
{
    const size_t P = mha_widest_panel(a), size = a->kernels->size;
    const size_t panels = a->split.panels;
    const size_t wanted = mha_divide_up(panels_of_averages(a), TASKS_PER_THREAD * a->team->threads);
    mha_layout *layout = &a->at.layout, kept = {0};
    mha_plan_panels(a, a->tasks.kept_panels);
    a->tasks.kept_tasks = even_parts(a, mha_divide_up(panels, mha_smaller(a->tasks.kept_panels, wanted)), panels);
    mha_reserve(&kept, mha_max_blocks(a) * mha_max_block_keys(a), P, size);
    a->at.kept_bytes = 2 * kept.bytes;
    a->at.kept = mha_reserve_copies(layout, 2 * a->tasks.kept_panels, &kept);
    a->at.rows = mha_reserve(layout, P, MHA_BLOCK_KEYS, size);
}

/* Plans the scratch of the second pass behind that of the first. */
static void plan_second_pass(mha_attention *a)
{
    const size_t P = mha_widest_panel(a), size = a->kernels->size;
    const size_t blocks = mha_smaller(SEGMENT_BLOCKS, mha_max_blocks(a));
    mha_layout *layout = &a->at.layout;
    a->tasks.segments = mha_divide_up(mha_max_blocks(a), SEGMENT_BLOCKS);
    a->at.probabilities = mha_reserve(layout, blocks * mha_max_block_keys(a), P, size);
    a->at.rows = mha_reserve(layout, P, MHA_BLOCK_KEYS, size);
}

size_t mha_plan_probabilities(mha_attention *a, mha_plan *plan)
{
    mha_plan_attention(a);
    split_queries(a);
    const size_t statistics = a->batch->count * a->H * a->split.vectors * a->kernels->lanes;
    mha_place(plan, &a->maximum, statistics, 1, a->kernels->size);
    mha_place(plan, &a->sum, statistics, 1, a->kernels->size);
    if (a->tasks.kept_panels > 0)
        plan_kept(a);
    else
        plan_second_pass(a);
    return a->at.layout.bytes;
}

mha_status mha_attend_with_probabilities(mha_attention *a)
{
    mha_status status = MHA_OK;
    if (a->tasks.kept_panels > 0)
        return mha_parallel_for(a->team, averages_of_call(a) * a->tasks.kept_tasks, attend_and_write_task, a);
    if (a->wanted != MHA_WANT_SCORES)
        status = mha_attend(a);
    if (status != MHA_OK)
        return status;
    return mha_parallel_for(a->team, panels_of_averages(a) * a->tasks.segments, second_pass_task, a);
}
