/* SPDX-License-Identifier: Apache-2.0
 *
 * panels.h - how a row of numbers is cut into panels, and a matrix packed that way.
 *
 * A width becomes whole vectors, and these are shared out evenly: 64 vectors are 20 panels of 3 and 2 of 2, since a
 * panel of 1 would leave the multiply-add units waiting for its few accumulators.
 */
#ifndef MHA_PANELS_H
#define MHA_PANELS_H

#include "kernels/kernels.h"
#include "sizes.h"

typedef struct {
    size_t width;   /* numbers that count */
    size_t lanes;   /* of a vector */
    size_t vectors; /* in all */
    size_t panels;
} mha_split;

typedef struct {
    size_t first;   /* number of lane 0 */
    size_t count;   /* lanes that count */
    size_t vectors; /* P = vectors * lanes */
} mha_panel;

static inline mha_split mha_split_width(const mha_kernels *kernels, size_t width)
{
    const size_t vectors = mha_divide_up(width, kernels->lanes);
    const size_t panels = mha_divide_up(vectors, kernels->vectors);
    return (mha_split){.width = width, .lanes = kernels->lanes, .vectors = vectors, .panels = panels};
}

static inline mha_panel mha_panel_at(const mha_split *split, size_t i)
{
    const size_t before = mha_first_of_part(split->vectors, split->panels, i), first = before * split->lanes;
    const size_t vectors = mha_first_of_part(split->vectors, split->panels, i + 1) - before;
    return (mha_panel){first, mha_smaller(split->width - first, vectors * split->lanes), vectors};
}

/* A weight matrix (features, depth) packed for the kernels, panel after panel, each [depth][P]:
 *
 *      weight              panel 0         panel 1
 *      +---------+ 0       0 ... P-1       P ... 2P-1
 *      | depth > |         +--------+      +--------+
 *      | v       |   -->   | depth  |      | depth  |      panel i begins at first(i) * depth
 *      | features|         | v      |      | v      |
 *      +---------+         +--------+      +--------+      lanes beyond the last feature are 0
 */
typedef struct {
    mha_split split; /* of the features */
    size_t depth;
    const char *data;
    const char *bias; /* padded to whole vectors; NULL: none */
} mha_panels;

#endif
