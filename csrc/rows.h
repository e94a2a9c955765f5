/* SPDX-License-Identifier: Apache-2.0
 *
 * rows.h - where rows are: one description for inputs, results and the workspace.
 *
 * Row l of head h of the item at place i of a batch begins at
 *
 *      data + (items ? items[i] : i) * item + h * head + l * row
 *
 * Heads side by side or apart, items in any order, axes that broadcast: all are such strides.
 */
#ifndef MHA_ROWS_H
#define MHA_ROWS_H

#include "base.h"

typedef struct {
    char *data;     /* the core does not write to inputs */
    mha_dtype type; /* a half only in attention alone; for all else, the binding widens halves */
    /* Distances in bytes. They may be negative, zero, or not a multiple of the size of a number. */
    ptrdiff_t item, head, row;
    ptrdiff_t element; /* between the numbers of a row */
    const ptrdiff_t *items; /* a factor of `item` for each place, for example the item's index in the call */
} mha_rows;

static inline char *mha_row_at(const mha_rows *x, size_t i, size_t h, size_t l)
{
    const ptrdiff_t item = x->items ? x->items[i] : (ptrdiff_t)i;
    return x->data + item * x->item + (ptrdiff_t)h * x->head + (ptrdiff_t)l * x->row;
}

/* Rows of a C-contiguous array (items, heads, length, width). Sizes are unsigned: they may overflow if there is no such
 * array. */
static inline mha_rows mha_contiguous_rows(void *data, mha_dtype type, size_t heads, size_t length, size_t width)
{
    const size_t element = mha_size_of(type), row = width * element, head = length * row;
    return (mha_rows){.data = data, .type = type, .item = (ptrdiff_t)(heads * head), .head = (ptrdiff_t)head,
                      .row = (ptrdiff_t)row, .element = (ptrdiff_t)element};
}

/* The same rows, for items with these indices. */
static inline mha_rows mha_with_items(const mha_rows *x, const ptrdiff_t *items)
{
    mha_rows rows = *x;
    rows.items = items;
    return rows;
}

/* The distance between rows in numbers, for kernels, which do not read rows of halves. */
static inline ptrdiff_t mha_stride_of(const mha_rows *x)
{
    return x->type == MHA_FLOAT32 ? x->row / (ptrdiff_t)sizeof(float) : x->row / (ptrdiff_t)sizeof(double);
}

#endif
