/* SPDX-License-Identifier: Apache-2.0
 *
 * projection.c - multiplies rows by packed weights: blocks of rows, copies of them, bias, tasks.
 *
 * A task multiplies a block of rows by some panels. It copies its rows slice by slice, so that the numbers of a chain
 * are close together. Rows that are short and lie regularly are not copied, nor are rows that the thread has just
 * copied for another task. The slice is multiplied by the same slice of each panel. Sums go through a strip, which
 * stays in the cache. One or two rows are multiplied by several panels at once:
 *
 *          slice                    panel          strip
 *        +-------+---             +-------+      +-------+
 *   rows | block |  (x)     slice |  P    |      |  P    | rows   = addend + chain, chain after chain;
 *        +-------+---             +-------+      +-------+          the last chain goes straight to y
 *
 * If products are narrow, the copy of a row is narrow. If it is quantized, it has one scale, and a product is as long
 * as a slice.
 *
 * Owns: the order of additions: bias, then chains of MHA_CHAIN features in order, or sums of MHA_INT8_FEATURES
 * features. It does not depend on the blocking.
 */
#include "projection.h"

#include <stdint.h>
#include <string.h>

enum {
    MAX_BLOCK_ROWS = 128, /* rows for which a slice of a panel is read once */
    /* of a slice of a block, which has to fit into the second-level cache; blocks of wide rows have fewer rows */
    MAX_BLOCK_BYTES = 491520,
    MAX_SLICE_BYTES = 16384, /* of one row, unless a chain is longer; whole chains */
    /* panels of a task if rows have several slices; each has a strip, which waits for the next slice */
    MAX_SLICED_PANELS = 32,
    TASKS_PER_THREAD = 8,   /* so that threads end at about the same time */
    PANELS_PER_POLL = 16,   /* between two polls */
    MAX_SHORT_BYTES = 1600, /* between rows read in place; several such rows share a page */
};

/* A slice of some rows. take_slice() sets where it is. */
typedef struct {
    size_t first_row, rows, first_feature, features;
    const char *data;
    ptrdiff_t row_stride, chain_stride; /* distances between rows and between chains, in numbers */
} sliced_rows;

/* The slice that a thread has copied. It stands in the first cache line of the thread's scratch. The next task may need
 * the same slice. */
typedef struct {
    const mha_projection *projection; /* NULL: none */
    size_t first_row, first_feature;
} copied_slice;

_Static_assert(sizeof(copied_slice) <= MHA_CACHE_LINE, "it lies in the first cache line");
_Static_assert(MAX_SLICE_BYTES % (MHA_CHAIN * sizeof(double)) == 0, "a slice is whole chains");

/* Panels of a target that are multiplied at once: neighbours of the same width. */
typedef struct {
    const mha_target *target;
    mha_panel panel; /* `count` covers all of them, `vectors` is that of one */
    size_t at_once;
} adjacent_panels;

typedef struct {
    const mha_kernels *kernels;
    const mha_projection *projections;
    const mha_team *team;
} projection_tasks;

/* The number of tasks that share the panels of a block, in groups that are multiplied at once. It gives enough tasks to
 * all threads, and the shortest time until the last thread is ready: if two threads share 11 equal tasks, one of them
 * waits. */
static size_t choose_tasks_per_block(const mha_blocking *p, size_t groups, size_t threads)
{
    const size_t min_tasks = mha_smaller(mha_divide_up(TASKS_PER_THREAD * threads, p->blocks), groups);
    size_t best = min_tasks, best_time = SIZE_MAX;
    for (size_t tasks = min_tasks; tasks <= mha_smaller(2 * min_tasks + 1, groups); tasks++) {
        const size_t turns = mha_divide_up(p->blocks * tasks, threads);
        const size_t time = turns * mha_divide_up(groups, tasks);
        if (time < best_time) {
            best = tasks;
            best_time = time;
        }
    }
    return best;
}

/* Numbers of a row in the block. */
static size_t row_width(const mha_blocking *p)
{
    return mha_divide_up(mha_larger(p->slice, 1), p->chain) * p->chain_width;
}

static mha_blocking choose_blocking(const mha_kernels *kernels, const mha_projection *projection, size_t threads)
{
    const mha_narrow_kernels *narrow = projection->target[0].panels->narrow;
    const size_t rows = mha_walk_rows(projection->walk), depth = projection->target[0].panels->depth;
    const size_t chain = narrow ? narrow->chain : MHA_CHAIN;
    const size_t slice = mha_larger(MAX_SLICE_BYTES / kernels->size, chain);
    mha_blocking p = {.rows = rows, .depth = depth, .slice = mha_smaller(depth, slice), .chain = chain};
    p.chain_width = narrow ? narrow->row_words(mha_smaller(p.slice, chain))
                           : mha_smaller(mha_divide_up(p.slice, kernels->lanes) * kernels->lanes, MHA_CHAIN);
    p.slices = depth ? mha_divide_up(depth, slice) : 1;
    const size_t fit = MAX_BLOCK_BYTES / (mha_larger(row_width(&p), 1) * kernels->size) / MHA_ROW_UNIT * MHA_ROW_UNIT;
    p.blocks = mha_divide_up(rows, mha_smaller(MAX_BLOCK_ROWS, fit));
    if (p.blocks)
        p.block_rows = mha_divide_up(mha_row_units(rows), p.blocks) * MHA_ROW_UNIT;
    for (size_t t = 0; t < projection->targets; t++)
        p.panels += projection->target[t].panels->split.panels;
    p.at_once = mha_larger(mha_smaller(p.panels / threads, mha_panels_at_once(rows)), 1);
    p.task_panels = p.panels;
    if (threads > 1 && p.blocks && p.panels) {
        const size_t groups = mha_divide_up(p.panels, p.at_once);
        p.task_panels = mha_divide_up(groups, choose_tasks_per_block(&p, groups, threads)) * p.at_once;
    }
    if (p.slices > 1 && p.task_panels > MAX_SLICED_PANELS)
        p.task_panels = MAX_SLICED_PANELS;
    p.tasks_per_block = p.panels ? mha_divide_up(p.panels, p.task_panels) : 0; /* an output may have no features */
    p.interleaved_blocks = threads;
    p.tasks = p.blocks * p.tasks_per_block;
    return p;
}

/* The rows of a block are whole units, so there is room for a few rows times several panels, too. */
static size_t strip_size(const mha_kernels *kernels, const mha_blocking *p)
{
    return p->block_rows * kernels->vectors * kernels->lanes;
}

static size_t waiting_strips(const mha_blocking *p)
{
    return p->slices > 1 ? MAX_SLICED_PANELS : 1;
}

static bool is_same_input(const mha_projection *p, const mha_walk *walk, const mha_rows *x, const mha_panels *panels)
{
    return mha_is_same_walk(p->walk, walk) && p->x->data == x->data && p->x->item == x->item &&
           p->x->row == x->row && p->x->element == x->element && p->target[0].panels->depth == panels->depth &&
           p->target[0].panels->narrow == panels->narrow;
}

void mha_add_projection(mha_projection *projections, size_t *count, const mha_walk *walk, const mha_rows *x,
                        const mha_target *target)
{
    mha_projection *p = projections + *count;
    if (*count > 0 && is_same_input(p - 1, walk, x, target->panels)) {
        p--;
    } else {
        p->walk = walk;
        p->x = x;
        p->targets = 0;
        ++*count;
    }
    p->target[p->targets++] = *target;
}

size_t mha_plan_projection(const mha_kernels *kernels, mha_projection *projection, size_t threads)
{
    projection->blocking = choose_blocking(kernels, projection, threads);
    mha_blocking *p = &projection->blocking;
    mha_layout layout = {0};
    mha_reserve(&layout, 1, 1, sizeof(copied_slice));
    p->block_at = mha_reserve(&layout, p->block_rows, row_width(p), kernels->size);
    p->strips_at = mha_reserve(&layout, waiting_strips(p), strip_size(kernels, p), kernels->size);
    p->spare_at = mha_reserve(&layout, projection->target[0].panels->narrow ? p->slice : 0, 1, kernels->size);
    p->scratch = layout;
    return layout.bytes;
}

/* Whether rows can be read where they are: they are short, aligned and equally spaced. */
static bool can_stay(const mha_run *run, const mha_rows *x, size_t rows)
{
    const size_t size = mha_size_of(x->type), distance = (size_t)run->distance;
    return run->rows == rows && x->element == (ptrdiff_t)size && run->distance > 0 && distance <= MAX_SHORT_BYTES &&
           distance % size == 0 && (uintptr_t)run->data % size == 0;
}

/* Prefetches a row. Rows are too far apart for the hardware to foresee the next one. */
static void prefetch_row(const char *x, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += MHA_CACHE_LINE)
        __builtin_prefetch(x + i, 0, 2);
}

/* Copies a slice of some rows to a block. */
static void copy_slice(const mha_projection *projection, const sliced_rows *slice, char *block)
{
    const mha_blocking *p = &projection->blocking;
    const mha_rows *x = projection->x;
    const size_t size = mha_size_of(x->type), features = slice->features;
    const size_t chain_bytes = p->block_rows * p->chain_width * size;
    mha_run run;
    for (size_t done = 0; done < slice->rows; done += run.rows) {
        run = mha_run_at(projection->walk, x, slice->first_row + done, slice->first_row + slice->rows);
        const char *from = run.data + (ptrdiff_t)slice->first_feature * x->element;
        for (size_t r = 0; r < run.rows; r++, from += run.distance) {
            if (r + 1 < run.rows && x->element == (ptrdiff_t)size)
                prefetch_row(from + run.distance, features * size);
            char *to = block + (done + r) * p->chain_width * size;
            for (size_t k = 0; k < features; k += MHA_CHAIN, to += chain_bytes)
                mha_copy_row(from + (ptrdiff_t)k * x->element, x->element, mha_smaller(features - k, MHA_CHAIN), size,
                             to);
        }
    }
}

/* Numbers of a row, adjacent and aligned: where they are, or in `spare`. */
static const float *numbers_of(const mha_rows *x, const char *from, size_t features, char *spare)
{
    if (x->element == (ptrdiff_t)sizeof(float) && (uintptr_t)from % sizeof(float) == 0)
        return (const float *)(const void *)from;
    mha_copy_row(from, x->element, features, sizeof(float), spare);
    return (const float *)(const void *)spare;
}

/* The bits of the largest number of a row. */
static uint32_t largest_of_row(const mha_projection *projection, const char *row, char *spare)
{
    const mha_blocking *p = &projection->blocking;
    const mha_rows *x = projection->x;
    uint32_t largest = 0;
    for (size_t k = 0; k < p->depth; k += p->slice) {
        const size_t features = mha_smaller(p->depth - k, p->slice);
        const float *numbers = numbers_of(x, row + (ptrdiff_t)k * x->element, features, spare);
        const uint32_t of_slice = projection->target[0].panels->narrow->largest(numbers, features);
        largest = of_slice > largest ? of_slice : largest;
    }
    return largest;
}

/* The same as copy_slice() for narrow products. */
static void narrow_slice(const mha_projection *projection, const sliced_rows *slice, char *spare, char *block)
{
    const mha_blocking *p = &projection->blocking;
    const mha_narrow_kernels *narrow = projection->target[0].panels->narrow;
    const mha_rows *x = projection->x;
    const size_t features = slice->features, row_words = p->chain_width;
    const ptrdiff_t first = (ptrdiff_t)slice->first_feature * x->element;
    mha_run run;
    for (size_t done = 0; done < slice->rows; done += run.rows) {
        run = mha_run_at(projection->walk, x, slice->first_row + done, slice->first_row + slice->rows);
        for (size_t r = 0; r < run.rows; r++) {
            const char *row = run.data + (ptrdiff_t)r * run.distance;
            const uint32_t largest = narrow->largest ? largest_of_row(projection, row, spare) : 0;
            const float *numbers = numbers_of(x, row + first, features, spare);
            uint32_t *to = (uint32_t *)(void *)block + (done + r) * row_words;
            size_t k = 0;
            do {
                narrow->take_row(numbers + k, mha_smaller(features - k, p->chain), largest, to);
                k += p->chain;
                to += p->block_rows * row_words;
            } while (k < features);
        }
    }
}

/* Leaves a slice where it is, or copies it to the block. */
static void take_slice(const mha_projection *projection, sliced_rows *slice, copied_slice *copied, char *block,
                       char *spare)
{
    const mha_blocking *p = &projection->blocking;
    const bool is_narrow = projection->target[0].panels->narrow != NULL;
    const size_t first_row = slice->first_row, first_feature = slice->first_feature;
    if (p->slices == 1 && !is_narrow) {
        mha_run run = mha_run_at(projection->walk, projection->x, first_row, first_row + slice->rows);
        const ptrdiff_t size = (ptrdiff_t)mha_size_of(projection->x->type);
        if (slice->rows == 1)
            run.distance = (ptrdiff_t)p->depth * size; /* a single row has no distance: its length is looked at */
        if (can_stay(&run, projection->x, slice->rows)) {
            slice->data = run.data;
            slice->row_stride = run.distance / size;
            slice->chain_stride = MHA_CHAIN;
            return;
        }
    }
    if (copied->projection != projection || copied->first_row != first_row || copied->first_feature != first_feature) {
        if (is_narrow)
            narrow_slice(projection, slice, spare, block);
        else
            copy_slice(projection, slice, block);
    }
    *copied = (copied_slice){projection, first_row, first_feature};
    slice->data = block;
    slice->row_stride = (ptrdiff_t)p->chain_width;
    slice->chain_stride = (ptrdiff_t)(p->block_rows * p->chain_width);
}

/* What is needed next of the panels. The weights are much larger than the caches near the core, and the hardware
 * notices too late that the next chain is needed. */
static mha_prefetch next_weights(const mha_kernels *kernels, const mha_panels *panels, size_t chain, const char *b)
{
    const size_t row = panels->split.lanes * panels->group_bytes;
    const char *end = panels->data + panels->split.vectors * row * mha_groups(panels, panels->depth);
    const size_t product = mha_groups(panels, mha_smaller(panels->depth, chain)) * kernels->vectors * row;
    const size_t bytes = b < end ? mha_smaller((size_t)(end - b), product) : 0;
    return (mha_prefetch){.data = b, .rows = bytes > 0, .bytes = bytes};
}

static void multiply(const mha_kernels *kernels, const mha_target *target, const mha_product *product)
{
    if (target->panels->narrow)
        target->panels->narrow->product(product);
    else
        kernels->product(product);
}

/* Multiplies the last chain of some panels straight to a run of rows of y. Features of different heads are multiplied
 * one head after the other. Overwrites `product`. */
static void multiply_to_run(const mha_kernels *kernels, const adjacent_panels *b, const mha_run *run,
                            mha_product *product)
{
    const mha_target *target = b->target;
    const size_t lanes = kernels->lanes, size = kernels->size;
    size_t head = target->head_width ? b->panel.first / target->head_width : 0;
    size_t feature = b->panel.first - head * target->head_width, vectors = b->panel.vectors;
    product->rows = run->rows;
    product->c_row = (size_t)run->distance / size;
    while (vectors > 0) {
        const size_t here = target->head_width ? mha_smaller((target->head_width - feature) / lanes, vectors) : vectors;
        product->vectors = here;
        product->c = run->data + (ptrdiff_t)head * target->y->head + (ptrdiff_t)(feature * size);
        multiply(kernels, target, product);
        product->b = (const char *)product->b + here * lanes * target->panels->group_bytes;
        if (product->b_scale)
            product->b_scale += here * lanes;
        if (product->addend)
            product->addend = (const char *)product->addend + here * lanes * size;
        product->prefetch = NULL;
        vectors -= here;
        feature = 0;
        head++;
    }
}

/* The same for rows that may be several runs. */
static void multiply_to_y(const mha_kernels *kernels, const mha_walk *walk, const adjacent_panels *b,
                          const sliced_rows *x, const mha_product *product)
{
    const size_t size = kernels->size;
    mha_run run;
    for (size_t done = 0; done < x->rows; done += run.rows) {
        run = mha_run_at(walk, b->target->y, x->first_row + done, x->first_row + x->rows);
        mha_product some = *product;
        some.a = (const char *)product->a + (ptrdiff_t)done * product->a_row * (ptrdiff_t)size;
        if (product->addend)
            some.addend = (const char *)product->addend + done * product->addend_row * size;
        multiply_to_run(kernels, b, &run, &some);
    }
}

/* Copies the finished sums of some panels from their strip to y. */
static void copy_strip(const mha_walk *walk, const adjacent_panels *b, const sliced_rows *x, const char *strip,
                       size_t strip_bytes)
{
    const size_t size = mha_size_of(b->target->y->type);
    mha_run run;
    for (size_t done = 0; done < x->rows; done += run.rows) {
        run = mha_run_at(walk, b->target->y, x->first_row + done, x->first_row + x->rows);
        for (size_t r = 0; r < run.rows; r++)
            memcpy(run.data + (ptrdiff_t)r * run.distance + b->panel.first * size, strip + (done + r) * strip_bytes,
                   b->panel.count * size);
    }
}

/* Adds the product of a slice and some panels to their strip. That of the last slice goes to y. */
static void multiply_slice(const mha_kernels *kernels, const mha_projection *projection, const sliced_rows *x,
                           const adjacent_panels *b, char *strip)
{
    const mha_blocking *p = &projection->blocking;
    const mha_panels *panels = b->target->panels;
    const mha_panel panel = b->panel;
    const size_t size = kernels->size, P = panel.vectors * kernels->lanes, b_row = P * panels->group_bytes;
    const size_t width = b->at_once * P;
    const bool fits = panel.count == width || panel.first + width <= b->target->room;
    const char *addend = strip, *a = x->data;
    size_t addend_row = width, k = 0;
    if (x->first_feature == 0) {
        addend = panels->bias ? panels->bias + panel.first * size : NULL;
        addend_row = 0;
    }
    do {
        const size_t chain = mha_smaller(x->features - k, p->chain);
        const char *row = mha_panel_row(panels, &panel, x->first_feature + k);
        const size_t groups = mha_groups(panels, chain);
        const mha_prefetch prefetch = next_weights(kernels, panels, p->chain, row + groups * b_row);
        mha_product product = {.rows = x->rows, .depth = groups, .vectors = panel.vectors, .a = a,
                               .a_row = x->row_stride, .a_k = 1, .b = row, .b_k = P, .b_type = panels->type,
                               .more_panels = b->at_once - 1, .b_panel_bytes = mha_groups(panels, p->depth) * b_row,
                               .b_scale = panels->scale ? panels->scale + panel.first : NULL, .addend = addend,
                               .addend_row = addend_row, .c = strip, .c_row = width, .prefetch = &prefetch};
        k += p->chain;
        a += (ptrdiff_t)size * x->chain_stride;
        if (fits && x->first_feature + k >= p->depth) {
            multiply_to_y(kernels, projection->walk, b, x, &product);
            return;
        }
        multiply(kernels, b->target, &product);
        addend = strip;
        addend_row = width;
    } while (k < x->features);
    if (x->first_feature + k >= p->depth)
        copy_strip(projection->walk, b, x, strip, width * size);
}

/* Panel i, counted through all targets, and those that are multiplied with it. They are `most` at most. */
static adjacent_panels panels_from(const mha_projection *projection, size_t i, size_t most)
{
    const mha_target *target = projection->target;
    while (i >= target->panels->split.panels)
        i -= (target++)->panels->split.panels;
    adjacent_panels b = {.target = target};
    b.panel = mha_panels_at(&target->panels->split, i, most, &b.at_once);
    return b;
}

static char *scratch_of(const projection_tasks *j, const mha_projection *projection, size_t worker)
{
    char *scratch = mha_scratch_of(j->team, worker);
    mha_guard(&projection->blocking.scratch, scratch);
    return scratch;
}

static copied_slice *copied_in(char *scratch)
{
    return (copied_slice *)(void *)scratch;
}

/* The block of a task, and the first of its panels. Of interleaved blocks, the first tasks of all come before the
 * second ones. */
static size_t block_of_task(const mha_blocking *p, size_t task, size_t *first_panel)
{
    const size_t together = p->interleaved_blocks * p->tasks_per_block;
    const size_t first_block = task / together * p->interleaved_blocks;
    const size_t blocks = mha_smaller(p->interleaved_blocks, p->blocks - first_block);
    *first_panel = task % together / blocks * p->task_panels;
    return first_block + task % together % blocks;
}

static void run_task(void *context, size_t task, size_t worker)
{
    const projection_tasks *j = context;
    const mha_projection *projection = j->projections;
    while (task >= projection->blocking.tasks)
        task -= (projection++)->blocking.tasks;
    const mha_blocking *p = &projection->blocking;
    const size_t size = j->kernels->size;
    size_t first_panel;
    const size_t block_index = block_of_task(p, task, &first_panel);
    const size_t first_row = mha_first_row_of_part(p->rows, p->blocks, block_index);
    const size_t rows = mha_rows_of_part(p->rows, p->blocks, block_index);
    const size_t end = mha_smaller(first_panel + p->task_panels, p->panels);
    char *scratch = scratch_of(j, projection, worker), *block = scratch + p->block_at, *strips = scratch + p->strips_at;
    copied_slice *copied = copied_in(scratch);
    for (size_t s = 0; s < p->slices; s++) {
        sliced_rows x = {.first_row = first_row, .rows = rows, .first_feature = s * p->slice,
                         .features = mha_smaller(p->depth - s * p->slice, p->slice)};
        take_slice(projection, &x, copied, block, scratch + p->spare_at);
        for (size_t i = first_panel, next; i < end; i = next) {
            const adjacent_panels b = panels_from(projection, i, mha_smaller(p->at_once, end - i));
            char *strip = strips + (p->slices > 1 ? i - first_panel : 0) * strip_size(j->kernels, p) * size;
            multiply_slice(j->kernels, projection, &x, &b, strip);
            next = i + b.at_once;
            if (i / PANELS_PER_POLL < next / PANELS_PER_POLL && mha_is_stopped())
                return;
        }
    }
}

mha_status mha_project(const mha_kernels *kernels, const mha_projection *projections, size_t count,
                       const mha_team *team)
{
    projection_tasks j = {.kernels = kernels, .projections = projections, .team = team};
    size_t tasks = 0;
    for (size_t i = 0; i < count; i++)
        tasks += projections[i].blocking.tasks;
    for (size_t worker = 0; worker < team->threads; worker++)
        copied_in(scratch_of(&j, projections, worker))->projection = NULL;
    return mha_parallel_for(team, tasks, run_task, &j);
}
