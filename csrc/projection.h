/* SPDX-License-Identifier: Apache-2.0
 *
 * projection.h - multiplies rows by weight matrices: y = x W^T + b, for the inputs and for the output.
 */
#ifndef MHA_PROJECTION_H
#define MHA_PROJECTION_H

#include "panels.h"
#include "threads.h"
#include "walk.h"
#include "workspace.h"

enum { MHA_TARGETS = 3 };

/* Tiles of three and of one vector have 4 or 8 rows, so rows are divided into whole units. */
enum { MHA_ROW_UNIT = 8 };

static inline size_t mha_row_units(size_t rows)
{
    return mha_divide_up(rows, MHA_ROW_UNIT);
}

/* The first row of part i, if some parts share rows evenly. */
static inline size_t mha_first_row_of_part(size_t rows, size_t parts, size_t i)
{
    return mha_smaller(mha_first_of_part(mha_row_units(rows), parts, i) * MHA_ROW_UNIT, rows);
}

static inline size_t mha_rows_of_part(size_t rows, size_t parts, size_t i)
{
    return mha_first_row_of_part(rows, parts, i + 1) - mha_first_row_of_part(rows, parts, i);
}

/* Where a product goes: y has the rows of the walk, with heads of `head_width` features. If the heads are apart, a
 * head is whole vectors. If head_width is 0, they are side by side, as those of a few rows always are.
 *
 * Kernels write whole vectors. If they fit into `room`, numbers after the last feature are overwritten. If they do not
 * fit, rows are written up to the last feature. */
typedef struct {
    const mha_panels *panels;
    const mha_rows *y;
    size_t head_width;
    size_t room; /* numbers of a row of y, from feature 0 on */
} mha_target;

/* How the rows and panels of a projection are divided into tasks. */
typedef struct {
    size_t rows, depth, slice, slices;
    size_t chain; /* features of one product, at most */
    /* numbers, or words of a narrow row, that a row has in one chain of the block; the block holds one chain of all
     * rows after the other */
    size_t chain_width;
    size_t blocks, block_rows; /* blocks of rows; the rows of the largest one */
    size_t panels;            /* of all targets */
    size_t at_once;           /* the most panels multiplied at once; every thread has that many */
    size_t task_panels;       /* of one task */
    size_t tasks_per_block;
    /* blocks at which threads take turns, so that a thread's next task is usually on rows that it has copied */
    size_t interleaved_blocks;
    size_t tasks;
    mha_layout scratch; /* of a thread */
    size_t block_at, strips_at, spare_at; /* offsets into it, in bytes */
} mha_blocking;

/* One input and what is made from it. Its rows are read once for all targets (q, k and v of the same input). */
typedef struct {
    const mha_walk *walk;
    const mha_rows *x;
    size_t targets;
    mha_target target[MHA_TARGETS];
    mha_blocking blocking; /* set by mha_plan_projection() */
} mha_projection;

/* Adds what is made from an input. If it is the input that was added before, its rows are read once for both. */
void mha_add_projection(mha_projection *projections, size_t *count, const mha_walk *walk, const mha_rows *x,
                        const mha_target *target);

/* Completes the plan of a projection, and returns the bytes of scratch that each thread needs. */
size_t mha_plan_projection(const mha_kernels *kernels, mha_projection *projection, size_t threads);

/* Runs `count` projections together. */
mha_status mha_project(const mha_kernels *kernels, const mha_projection *projections, size_t count,
                       const mha_team *team);

#endif
