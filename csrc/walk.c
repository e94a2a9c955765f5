/* SPDX-License-Identifier: Apache-2.0
 *
 * walk.c - where the rows of a walk are.
 */
#include "walk.h"

#include <string.h>

enum {
    MIN_APART = 4,      /* vectors of a head; narrower heads are not apart, since a panel is cut at their ends */
    MIN_ROWS_APART = 9, /* fewer rows are on few pages anyway */
};

void mha_walk_live_keys(mha_walk *walk, const mha_batch *batch, mha_plan *plan)
{
    *walk = (mha_walk){.items = batch->count, .length = batch->S, .live = batch};
    walk->first_at = mha_place(plan, &walk->first, walk->items + 1, 1, sizeof *walk->first);
}

void mha_list_first_rows(const mha_walk *walk)
{
    if (!walk->live)
        return;
    walk->first[0] = 0;
    for (size_t i = 0; i < walk->items; i++)
        walk->first[i + 1] = walk->first[i] + (ptrdiff_t)mha_live_keys(walk->live, i);
}

static size_t rows_of_item(const mha_walk *walk, size_t i)
{
    return walk->live ? mha_live_keys(walk->live, i) : walk->length;
}

bool mha_is_same_walk(const mha_walk *a, const mha_walk *b)
{
    return a->items == b->items && a->length == b->length && a->by_rows == b->by_rows && a->live == b->live;
}

size_t mha_walk_rows(const mha_walk *walk)
{
    return walk->live ? mha_all_live_keys(walk->live) : walk->items * walk->length;
}

/* Row r is row *l of the item that is returned. */
static size_t find_item(const mha_walk *walk, size_t r, size_t *l)
{
    if (!walk->live) {
        *l = r % walk->length;
        return r / walk->length;
    }
    size_t low = 0, high = walk->items; /* row r is not before item `low`, but before item `high` */
    while (high - low > 1) {
        const size_t middle = low + (high - low) / 2;
        if ((size_t)walk->first[middle] <= r)
            low = middle;
        else
            high = middle;
    }
    *l = r - (size_t)walk->first[low];
    return low;
}

/* Some rows of one item, from row l on, at most `rows`. */
static mha_run run_of_item(const mha_walk *walk, const mha_rows *x, size_t i, size_t l, size_t rows)
{
    const size_t *keys = walk->live ? mha_live_indices(walk->live, i) : NULL;
    if (!keys)
        return (mha_run){mha_row_at(x, i, 0, l), rows, x->row};
    keys += l;
    if (keys[rows - 1] - keys[0] != rows - 1) {
        size_t consecutive = 1;
        while (keys[consecutive] == keys[0] + consecutive)
            consecutive++;
        rows = consecutive;
    }
    return (mha_run){mha_row_at(x, i, 0, keys[0]), rows, x->row};
}

/* The run of a walk by rows that begins with row r: row l of items i, i + 1, ... If row l + 1 of the first item follows
 * at the same distance, the run goes on with it. */
static mha_run run_by_rows(const mha_walk *walk, const mha_rows *x, size_t r, size_t end)
{
    const size_t i = r % walk->items, rows = end - r;
    const bool goes_on = x->row == (ptrdiff_t)walk->items * x->item;
    return (mha_run){mha_row_at(x, i, 0, r / walk->items), goes_on ? rows : mha_smaller(walk->items - i, rows),
                     x->item};
}

/* Whether rows lie in the order of the walk, as in the workspace. */
static bool is_in_order(const mha_walk *walk, const mha_rows *x)
{
    return walk->live ? x->items == walk->first && x->item == x->row
                      : !x->items && x->item == (ptrdiff_t)walk->length * x->row;
}

mha_run mha_run_at(const mha_walk *walk, const mha_rows *x, size_t r, size_t end)
{
    if (walk->by_rows)
        return run_by_rows(walk, x, r, end);
    if (is_in_order(walk, x))
        return (mha_run){x->data + (ptrdiff_t)r * x->row, end - r, x->row};
    size_t l, i = find_item(walk, r, &l), of_item = rows_of_item(walk, i);
    mha_run run = run_of_item(walk, x, i, l, mha_smaller(of_item - l, end - r));
    for (r += run.rows, l += run.rows; r < end;) {
        while (l == of_item) {
            of_item = rows_of_item(walk, ++i);
            l = 0;
        }
        const mha_run next = run_of_item(walk, x, i, l, mha_smaller(of_item - l, end - r));
        const ptrdiff_t gap = (ptrdiff_t)((uintptr_t)next.data - (uintptr_t)run.data) -
                              (ptrdiff_t)(run.rows - 1) * run.distance;
        if (run.rows == 1)
            run.distance = gap;
        if (gap != run.distance || (next.rows > 1 && next.distance != gap))
            break;
        run.rows += next.rows;
        r += next.rows;
        l += next.rows;
    }
    return run;
}

/* Rows in the order of the walk, `row` numbers apart. */
static void place(mha_plan *plan, const mha_kernels *kernels, const mha_walk *walk, size_t row, size_t head,
                  size_t numbers, mha_rows *rows)
{
    const size_t size = kernels->size;
    rows->type = kernels->dtype;
    rows->element = (ptrdiff_t)size;
    rows->row = (ptrdiff_t)((walk->by_rows ? walk->items : 1) * row * size);
    rows->head = (ptrdiff_t)(head * size);
    rows->item = (ptrdiff_t)((walk->by_rows || walk->live ? 1 : walk->length) * row * size);
    rows->items = NULL;
    if (walk->live)
        mha_point(plan, &rows->items, walk->first_at);
    mha_place(plan, &rows->data, mha_walk_rows(walk), numbers, size);
}

void mha_place_rows(mha_plan *plan, const mha_kernels *kernels, const mha_walk *walk, size_t heads, size_t width,
                    mha_rows *rows)
{
    const size_t row = mha_row_stride(heads * width, kernels->lanes, kernels->size);
    place(plan, kernels, walk, row, width, row, rows);
}

size_t mha_place_heads(mha_plan *plan, const mha_kernels *kernels, const mha_walk *walk, size_t heads, size_t width,
                       mha_rows *rows)
{
    if (heads == 1 || width % kernels->lanes > 0 || width < MIN_APART * kernels->lanes ||
        mha_walk_rows(walk) < MIN_ROWS_APART) {
        mha_place_rows(plan, kernels, walk, heads, width, rows);
        return 0;
    }
    place(plan, kernels, walk, width, mha_walk_rows(walk) * width, heads * width, rows);
    return width;
}

void mha_copy_row(const char *x, ptrdiff_t step, size_t numbers, size_t size, char *to)
{
    if (step == (ptrdiff_t)size)
        memcpy(to, x, numbers * size);
    else if (size == sizeof(float))
        for (size_t e = 0; e < numbers; e++)
            memcpy(to + e * sizeof(float), x + (ptrdiff_t)e * step, sizeof(float));
    else
        for (size_t e = 0; e < numbers; e++)
            memcpy(to + e * sizeof(double), x + (ptrdiff_t)e * step, sizeof(double));
}
