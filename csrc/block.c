/* SPDX-License-Identifier: Apache-2.0
 *
 * block.c - a layer of a Transformer around its attention ("Attention Is All You Need", Vaswani et al., 2017, section
 * 3.1; norms that come first: "On Layer Normalization in the Transformer Architecture", Xiong et al., 2020).
 *
 * Owns: the rows between its steps. They lie in the workspace one after another, whatever item they belong to.
 */
#include "block.h"

#include "projection.h"

/* Of the hidden features of rows that go through the feed-forward network together, for each thread: about what its
 * second-level cache holds. The weights are read once for all these rows. */
enum { MAX_HIDDEN_BYTES = 524288 };

/* Rows of the workspace from row `first` on. While a pass is planned, they have no memory yet. */
static mha_rows rows_from(const mha_rows *rows, size_t first)
{
    const ptrdiff_t distance = mha_placed_distance(rows);
    return (mha_rows){.data = first == 0 ? rows->data : rows->data + (ptrdiff_t)first * distance, .type = rows->type,
                      .row = distance, .element = rows->element};
}

static size_t room_of(const mha_rows *rows)
{
    return (size_t)rows->row / mha_size_of(rows->type);
}

/* ---- The feed-forward network ---- */

static size_t hidden_width(const mha_block *block)
{
    return block->linear1->panels.split.width;
}

/* The number of parts that share the rows evenly. */
static size_t count_parts(const mha_block_pass *b)
{
    const size_t row = mha_row_stride(hidden_width(b->block), b->kernels->lanes, b->kernels->size) * b->kernels->size;
    const size_t units = b->team->threads * MAX_HIDDEN_BYTES / mha_larger(row, 1) / MHA_ROW_UNIT;
    return mha_divide_up(mha_row_units(mha_walk_rows(b->walk)), mha_larger(units, 1));
}

/* One part: hidden = activation(x W1^T + b1), y = hidden W2^T + b2. */
typedef struct {
    mha_walk walk;
    mha_rows x, hidden, y;
    mha_projection up, down;
} part;

/* Describes a part, and returns the bytes of scratch that each thread needs. */
static size_t plan_part(const mha_block_pass *b, size_t first, size_t rows, part *p)
{
    const mha_block *block = b->block;
    p->walk = (mha_walk){.items = 1, .length = rows};
    p->x = rows_from(block->norm_first ? &b->normal : &b->attended, first);
    p->hidden = rows_from(&b->hidden, 0);
    p->y = rows_from(&b->change, first);
    p->up = (mha_projection){.walk = &p->walk, .x = &p->x, .targets = 1,
                             .target = {{&block->linear1->panels, &p->hidden, 0, room_of(&p->hidden)}}};
    p->down = (mha_projection){.walk = &p->walk, .x = &p->hidden, .targets = 1,
                               .target = {{&block->linear2->panels, &p->y, 0, room_of(&p->y)}}};
    return mha_larger(mha_plan_projection(b->kernels, &p->up, b->team->threads),
                      mha_plan_projection(b->kernels, &p->down, b->team->threads));
}

static mha_status feed_forward(const mha_block_pass *b)
{
    const size_t rows = mha_walk_rows(b->walk), parts = count_parts(b);
    mha_status status = MHA_OK;
    for (size_t i = 0; i < parts && status == MHA_OK; i++) {
        part p;
        plan_part(b, mha_first_row_of_part(rows, parts, i), mha_rows_of_part(rows, parts, i), &p);
        const size_t distance = (size_t)p.hidden.row;
        const mha_activated_rows activated = {.kernels = b->kernels, .activation = b->block->activation,
                                              .is_gated = b->block->is_gated, .rows = p.walk.length,
                                              .width = b->block->linear2->panels.depth, .x = p.hidden.data,
                                              .x_distance = distance, .y = p.hidden.data, .y_distance = distance};
        status = mha_project(b->kernels, &p.up, 1, b->team);
        if (status == MHA_OK)
            status = mha_activate_rows(&activated, b->team);
        if (status == MHA_OK)
            status = mha_project(b->kernels, &p.down, 1, b->team);
    }
    return status;
}

/* ---- The steps ---- */

size_t mha_plan_block(mha_block_pass *b, mha_plan *plan)
{
    const mha_block *block = b->block;
    const size_t rows = mha_walk_rows(b->walk);
    if (block->norm_first) {
        b->normal.data = NULL; /* mha_add_projection() compares it before there is memory */
        mha_place_rows(plan, b->kernels, b->walk, 1, b->width, &b->normal);
    }
    mha_place_rows(plan, b->kernels, b->walk, 1, b->width, &b->attended);
    if (!block->linear1)
        return 0;
    mha_place_rows(plan, b->kernels, b->walk, 1, b->width, &b->change);
    const size_t parts = count_parts(b);
    const mha_walk largest = {.items = 1, .length = parts ? mha_rows_of_part(rows, parts, 0) : 0};
    mha_place_rows(plan, b->kernels, &largest, 1, hidden_width(block), &b->hidden);
    if (parts == 0 || mha_is_too_large(&plan->layout))
        return 0;
    /* Every part has as many rows as the first one, the last one, or the one before that. */
    const size_t some[] = {0, parts > 1 ? parts - 2 : 0, parts - 1};
    size_t scratch = 0;
    for (size_t i = 0; i < sizeof some / sizeof *some; i++) {
        part p;
        scratch = mha_larger(scratch, plan_part(b, 0, mha_rows_of_part(rows, parts, some[i]), &p));
    }
    return scratch;
}

mha_status mha_begin_block(const mha_block_pass *b)
{
    const mha_residual norm = {.kernels = b->kernels, .walk = b->walk, .width = b->width, .x = &b->x,
                               .norm = &b->block->attention_norm, .y = &b->normal};
    return b->block->norm_first ? mha_add_and_normalize(&norm, b->team) : MHA_OK;
}

typedef struct {
    const mha_block_pass *b;
    const mha_batch *batch;
} padded_output;

/* Rows of one item of the output that padding hides become 0. */
static void zero_task(void *context, size_t item, size_t worker)
{
    (void)worker;
    const padded_output *o = context;
    for (size_t l = 0, live = 0; l < o->batch->S; l++)
        if (live < mha_live_keys(o->batch, item) && mha_live_indices(o->batch, item)[live] == l)
            live++;
        else
            o->b->kernels->fill(mha_row_at(&o->b->output, item, 0, l), o->b->width, 0);
}

mha_status mha_end_block(const mha_block_pass *b, const mha_batch *batch)
{
    const mha_block *block = b->block;
    const bool is_last = !block->linear1, norm_first = block->norm_first;
    const mha_rows *end = is_last ? &b->output : &b->attended;
    const mha_norm *next = norm_first ? &block->feed_forward_norm : &block->attention_norm;
    const mha_residual first = {.kernels = b->kernels, .walk = b->walk, .width = b->width, .x = &b->x,
                                .added = &b->attended, .sum = end, .norm = next,
                                .y = !norm_first ? end : is_last ? NULL : &b->normal};
    const mha_residual last = {.kernels = b->kernels, .walk = b->walk, .width = b->width, .x = &b->attended,
                               .added = &b->change, .sum = &b->output, .norm = &block->feed_forward_norm,
                               .y = norm_first ? NULL : &b->output};
    mha_status status = mha_add_and_normalize(&first, b->team);
    if (status == MHA_OK && !is_last)
        status = feed_forward(b);
    if (status == MHA_OK && !is_last)
        status = mha_add_and_normalize(&last, b->team);
    padded_output padded = {b, batch};
    if (status == MHA_OK && block->zeroes_padding && batch->index)
        status = mha_parallel_for(b->team, batch->count, zero_task, &padded);
    return status;
}
