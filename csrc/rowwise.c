/* SPDX-License-Identifier: Apache-2.0
 *
 * rowwise.c - rows in tasks of some rows: copied, added, normalized, activated.
 *
 * Owns: nothing.
 */
#include "rowwise.h"

#include <string.h>

/* A task takes about a microsecond: far longer than to hand it out, and short enough to share few rows evenly. */
enum { NUMBERS_PER_TASK = 1 << 12 };

static size_t rows_per_task(size_t width)
{
    return mha_larger(NUMBERS_PER_TASK / mha_larger(width, 1), 1);
}

static void copy_task(void *context, size_t task, size_t worker)
{
    (void)worker;
    const mha_copied_rows *c = context;
    const size_t per_task = rows_per_task(c->heads * c->width), size = mha_size_of(c->x->type);
    const size_t end = mha_smaller((task + 1) * per_task, mha_walk_rows(c->walk));
    size_t rows;
    for (size_t r = task * per_task; r < end; r += rows) {
        const mha_run x = mha_run_at(c->walk, c->x, r, end), y = mha_run_at(c->walk, c->y, r, r + x.rows);
        rows = y.rows;
        for (ptrdiff_t i = 0; i < (ptrdiff_t)rows; i++)
            for (ptrdiff_t h = 0; h < (ptrdiff_t)c->heads; h++)
                mha_copy_row(x.data + i * x.distance + h * c->x->head, c->x->element, c->width, size,
                             y.data + i * y.distance + h * c->y->head);
    }
}

mha_status mha_copy_rows(const mha_copied_rows *copied, const mha_team *team)
{
    const size_t tasks = mha_divide_up(mha_walk_rows(copied->walk), rows_per_task(copied->heads * copied->width));
    return mha_parallel_for(team, tasks, copy_task, (void *)copied);
}

/* The run of x from row r on. Lowers *rows to the length of the run. */
static mha_run run_of(const mha_residual *s, const mha_rows *x, size_t r, size_t *rows)
{
    if (!x)
        return (mha_run){.data = NULL};
    const mha_run run = mha_run_at(s->walk, x, r, r + *rows);
    *rows = mha_smaller(*rows, run.rows);
    return run;
}

static void residual_task(void *context, size_t task, size_t worker)
{
    (void)worker;
    const mha_residual *s = context;
    const size_t per_task = rows_per_task(s->width), size = s->kernels->size;
    const size_t end = mha_smaller((task + 1) * per_task, mha_walk_rows(s->walk));
    size_t rows;
    for (size_t r = task * per_task; r < end; r += rows) {
        rows = end - r;
        const mha_run x = run_of(s, s->x, r, &rows), added = run_of(s, s->added, r, &rows);
        const mha_run sum = s->added ? run_of(s, s->sum, r, &rows) : x, y = run_of(s, s->y, r, &rows);
        for (ptrdiff_t i = 0; i < (ptrdiff_t)rows && s->added; i++)
            s->kernels->add(sum.data + i * sum.distance, x.data + i * x.distance, added.data + i * added.distance,
                            s->width);
        const mha_norm_rows norm = {.rows = rows, .width = s->width, .x = sum.data,
                                    .x_row = sum.distance / (ptrdiff_t)size, .y = y.data,
                                    .y_row = y.distance / (ptrdiff_t)size, .norm = *s->norm};
        if (s->y)
            s->kernels->normalize(&norm);
    }
}

mha_status mha_add_and_normalize(const mha_residual *residual, const mha_team *team)
{
    const size_t tasks = mha_divide_up(mha_walk_rows(residual->walk), rows_per_task(residual->width));
    return mha_parallel_for(team, tasks, residual_task, (void *)residual);
}

static void activation_task(void *context, size_t task, size_t worker)
{
    (void)worker;
    const mha_activated_rows *a = context;
    const size_t per_task = rows_per_task(a->width), end = mha_smaller((task + 1) * per_task, a->rows);
    for (size_t r = task * per_task; r < end; r++) {
        const char *x = a->x + r * a->x_distance;
        char *y = a->y + r * a->y_distance;
        const size_t bytes = a->width * a->kernels->size;
        if (y != x)
            memcpy(y, x, bytes);
        a->kernels->activate(a->activation, y, a->is_gated ? x + bytes : NULL, a->width);
    }
}

mha_status mha_activate_rows(const mha_activated_rows *activated, const mha_team *team)
{
    if (activated->width == 0)
        return MHA_OK; /* there may be any number of such rows */
    const size_t tasks = mha_divide_up(activated->rows, rows_per_task(activated->width));
    return mha_parallel_for(team, tasks, activation_task, (void *)activated);
}
