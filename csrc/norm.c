/* SPDX-License-Identifier: Apache-2.0
 *
 * norm.c - rows along any number of axes, normalized in tasks of some rows.
 *
 * Owns: nothing.
 */
#include "norm.h"

#include "cpu.h"
#include "threads.h"

/* A task takes some microseconds: far longer than to hand it out, and short enough to share few rows evenly. */
enum { NUMBERS_PER_TASK = 1 << 14 };

/* A number goes through about ten operations, at about the speed of those of a small product. */
#define OPERATIONS_PER_NUMBER 10

typedef struct {
    const mha_norm_call *call;
    const mha_kernels *kernels;
    size_t rows, rows_per_task;
} norm_loop;

static size_t count_rows(const mha_norm_call *call)
{
    size_t rows = 1;
    for (size_t axis = 0; axis < call->axes; axis++)
        rows *= call->length[axis]; /* cannot overflow: y has as many rows, unless it is empty */
    return rows;
}

double mha_norm_operations(const mha_norm_call *call)
{
    return OPERATIONS_PER_NUMBER * (double)count_rows(call) * (double)call->width;
}

/* The address of a row by its index, and how many rows follow at equal distances, itself among them. */
static const char *find_row(const mha_norm_call *call, size_t row, size_t *run)
{
    const char *x = call->x;
    *run = 1;
    for (size_t axis = call->axes; axis-- > 0;) {
        const size_t i = row % call->length[axis];
        if (axis + 1 == call->axes)
            *run = call->length[axis] - i;
        x += (ptrdiff_t)i * call->distance[axis];
        row /= call->length[axis];
    }
    return x;
}

static void normalize_task(void *context, size_t task, size_t worker)
{
    (void)worker;
    const norm_loop *loop = context;
    const mha_norm_call *call = loop->call;
    const ptrdiff_t size = (ptrdiff_t)loop->kernels->size, width = (ptrdiff_t)call->width;
    const size_t first = task * loop->rows_per_task, end = mha_smaller(first + loop->rows_per_task, loop->rows);
    mha_norm_rows rows = {.width = call->width, .x_row = call->axes > 0 ? call->distance[call->axes - 1] / size : 0,
                          .y_row = width, .norm = call->norm};
    for (size_t row = first; row < end; row += rows.rows) {
        size_t run;
        rows.x = find_row(call, row, &run);
        rows.y = (char *)call->y + (ptrdiff_t)row * width * size;
        rows.rows = mha_smaller(run, end - row);
        loop->kernels->normalize(&rows);
    }
}

mha_status mha_apply_norm(const mha_norm_call *call)
{
    norm_loop loop = {.call = call, .kernels = mha_cpu_kernels(call->dtype), .rows = count_rows(call)};
    if (loop.rows == 0 || call->width == 0)
        return MHA_OK;
    loop.rows_per_task = mha_larger(NUMBERS_PER_TASK / call->width, 1);
    const mha_team team = {.threads = call->threads, .stop = call->stop};
    return mha_parallel_for(&team, mha_divide_up(loop.rows, loop.rows_per_task), normalize_task, &loop);
}
