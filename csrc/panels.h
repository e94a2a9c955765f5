/* SPDX-License-Identifier: Apache-2.0
 *
 * panels.h - how a width is divided into panels, and a matrix packed as panels.
 *
 * A width is rounded up to whole vectors. Panels share the vectors evenly: 64 vectors are 20 panels of 3 vectors and 2
 * panels of 2. A panel of 1 vector would have too few sums to keep the multiply-add units busy.
 */
#ifndef MHA_PANELS_H
#define MHA_PANELS_H

#include "kernels/kernels.h"

typedef struct {
    size_t width;   /* in numbers */
    size_t lanes;   /* in a vector */
    size_t vectors; /* in all panels */
    size_t panels;
} mha_split;

typedef struct {
    size_t first;   /* the number in lane 0 */
    size_t count;   /* lanes in use */
    size_t vectors; /* P = vectors * lanes */
} mha_panel;

/* Panels of at most `most` vectors. */
static inline mha_split mha_split_evenly(const mha_kernels *kernels, size_t width, size_t most)
{
    const size_t vectors = mha_divide_up(width, kernels->lanes);
    const size_t panels = mha_divide_up(vectors, most);
    return (mha_split){.width = width, .lanes = kernels->lanes, .vectors = vectors, .panels = panels};
}

static inline mha_split mha_split_width(const mha_kernels *kernels, size_t width)
{
    return mha_split_evenly(kernels, width, kernels->vectors);
}

static inline mha_panel mha_panel_at(const mha_split *split, size_t i)
{
    const size_t before = mha_first_of_part(split->vectors, split->panels, i), first = before * split->lanes;
    const size_t vectors = mha_first_of_part(split->vectors, split->panels, i + 1) - before;
    return (mha_panel){first, mha_smaller(split->width - first, vectors * split->lanes), vectors};
}

/* Panel i and the panels of the same width after it, at most `most`. `count` covers all of them, `vectors` is that of
 * one. */
static inline mha_panel mha_panels_at(const mha_split *split, size_t i, size_t most, size_t *panels)
{
    mha_panel all = mha_panel_at(split, i);
    for (*panels = 1; *panels < mha_smaller(most, split->panels - i); ++*panels) {
        const mha_panel next = mha_panel_at(split, i + *panels);
        if (next.vectors != all.vectors)
            break;
        all.count += next.count;
    }
    return all;
}

/* A weight matrix (features, depth) packed for the kernels, panel after panel, each [depth][P]:
 *
 *      weight              panel 0         panel 1
 *      +---------+ 0       0 ... P-1       P ... 2P-1
 *      | depth > |         +--------+      +--------+
 *      | v       |   -->   | depth  |      | depth  |      panel i begins at first(i) * depth
 *      | features|         | v      |      | v      |
 *      +---------+         +--------+      +--------+      lanes beyond the last feature are 0
 *
 * Narrow panels have groups in the place of numbers: neighbours along the depth (kernels.h). */
typedef struct {
    mha_split split; /* of the features */
    size_t depth;
    mha_dtype type; /* of the numbers of `data`, which may be halves; not of int8 */
    const mha_narrow_kernels *narrow; /* NULL: products are not narrow */
    unsigned group_log2; /* of the numbers in a group: 0 unless products are narrow. A division takes many cycles. */
    size_t group_bytes;
    char *data;        /* written once, when the layer is made */
    float *scale;      /* of the features, if they are int8; padded with zeros to whole vectors; NULL otherwise */
    char *bias;        /* as it is computed, padded with zeros to whole vectors; NULL: none */
} mha_panels;

/* How many groups hold this many numbers. */
static inline size_t mha_groups(const mha_panels *panels, size_t numbers)
{
    return (numbers + ((size_t)1 << panels->group_log2) - 1) >> panels->group_log2;
}

/* The row with number k along the depth, of one panel. */
static inline char *mha_panel_row(const mha_panels *panels, const mha_panel *panel, size_t k)
{
    const size_t P = panel->vectors * panels->split.lanes, groups = mha_groups(panels, panels->depth);
    return panels->data + (panel->first * groups + (k >> panels->group_log2) * P) * panels->group_bytes;
}

#endif
