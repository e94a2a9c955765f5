/* SPDX-License-Identifier: Apache-2.0
 *
 * walk.h - goes through rows of all items, in runs of rows at equal distances.
 */
#ifndef MHA_WALK_H
#define MHA_WALK_H

#include "batch.h"
#include "workspace.h"

/* Which rows: the first `length` of each item, or its live keys. They go item by item, or row by row through all
 * items. */
typedef struct {
    size_t items, length;
    bool by_rows;          /* row 0 of every item comes first, then row 1; only for all items of a call, and all rows */
    const mha_batch *live; /* NULL: all items have `length` rows */
    ptrdiff_t *first;      /* [items + 1]: the index of the first row of each item; not used if live is NULL */
    size_t first_at;       /* its place in the workspace */
} mha_walk;

/* Plans a walk through the live keys of a batch. */
void mha_walk_live_keys(mha_walk *walk, const mha_batch *batch, mha_plan *plan);

/* Lists the first row of each item of such a walk, after the workspace is taken. */
void mha_list_first_rows(const mha_walk *walk);

bool mha_is_same_walk(const mha_walk *a, const mha_walk *b);

/* How many rows a walk has. */
size_t mha_walk_rows(const mha_walk *walk);

/* Some rows at equal distances, in bytes. */
typedef struct {
    char *data;
    size_t rows;
    ptrdiff_t distance;
} mha_run;

/* The longest run of rows of x that begins with row r and ends before row `end`. Rows that were placed for this walk
 * lie in its order. In all others, row l of an item is that of its live key l. */
mha_run mha_run_at(const mha_walk *walk, const mha_rows *x, size_t r, size_t end);

/* Copies numbers of `size` bytes that are `step` bytes apart. The copies are adjacent. */
void mha_copy_row(const char *x, ptrdiff_t step, size_t numbers, size_t size, char *to);

/* Plans memory for the rows of a walk, with heads side by side. */
void mha_place_rows(mha_plan *plan, const mha_kernels *kernels, const mha_walk *walk, size_t heads, size_t width,
                    mha_rows *rows);

/* The same with a matrix for each head, if heads are wide and rows are many: the rows are read one after another, and
 * with all heads side by side each row would be on another page. Returns the width of heads that are apart, otherwise
 * 0. */
size_t mha_place_heads(mha_plan *plan, const mha_kernels *kernels, const mha_walk *walk, size_t heads, size_t width,
                       mha_rows *rows);

/* The distance in bytes between rows that mha_place_rows() placed, in the order of the walk. */
static inline ptrdiff_t mha_placed_distance(const mha_rows *rows)
{
    return rows->item < rows->row ? rows->item : rows->row;
}

#endif
