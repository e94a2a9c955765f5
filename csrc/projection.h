/* SPDX-License-Identifier: Apache-2.0
 *
 * projection.h - multiplies rows by weight matrices: y = x W^T + b, for the inputs and for the output.
 */
#ifndef MHA_PROJECTION_H
#define MHA_PROJECTION_H

#include "panels.h"
#include "threads.h"

enum { MHA_TARGETS = 3 };

/* Where a product goes. If `head_width` is 0, y is one matrix with rows `stride` numbers apart. Otherwise each head of
 * `head_width` features (whole vectors) has a matrix of its own, `head_stride` numbers after the one before.
 *
 * Kernels write whole vectors. If they fit into `stride`, numbers after the last feature are overwritten. If they do
 * not fit, rows are written up to the last feature.
 *
 * If `group_rows` is not 0, only `group_rows` consecutive rows are `stride` apart. The next group of rows starts
 * `group_stride` numbers later, and rows are written up to the last feature. */
typedef struct {
    const mha_panels *panels;
    char *y;
    size_t stride;
    size_t head_width, head_stride;  /* head_width 0: one matrix */
    size_t group_rows, group_stride; /* group_rows 0: all rows are `stride` apart; otherwise head_width is 0 */
} mha_target;

/* One input and what is made from it. Its rows may be anywhere. They are read once for all targets (q, k and v of the
 * same input). */
typedef struct {
    size_t rows;
    const char *const *row_address; /* [rows]: the address of feature 0 */
    ptrdiff_t stride_e; /* bytes between features */
    size_t targets;
    mha_target target[MHA_TARGETS];
} mha_projection;

/* Copies features of `size` bytes that are stride_e bytes apart. The copies are adjacent. */
void mha_copy_row(const char *x, ptrdiff_t stride_e, size_t features, size_t size, char *to);

/* Bytes of scratch that each thread needs for any of these projections. */
size_t mha_projection_scratch(const mha_kernels *kernels, const mha_projection *projections, size_t count);

/* Runs `count` projections together. */
mha_status mha_project(const mha_kernels *kernels, const mha_projection *projections, size_t count,
                       const mha_team *team);

#endif
