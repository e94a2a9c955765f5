/* SPDX-License-Identifier: Apache-2.0
 *
 * projection.h - rows times weight matrices: y = x W^T + b, for the inputs and for the output.
 */
#ifndef MHA_PROJECTION_H
#define MHA_PROJECTION_H

#include "panels.h"

enum { MHA_TARGETS = 3 };

/* What is to be made from the rows: one matrix, or one for every `part` features, whole vectors, `part_stride` numbers
 * apart. Rows of y are `stride` numbers apart. Where that leaves room for whole vectors, numbers after the features are
 * overwritten too; a y without such room is written to the last feature only. There is none, either, where only `run`
 * rows after one another are `stride` apart, and the next such rows begin run_stride numbers after those. */
typedef struct {
    const mha_panels *panels;
    char *y;
    size_t stride;
    size_t part, part_stride; /* part 0: one matrix */
    size_t run, run_stride;   /* run 0: all rows; else part is 0 */
} mha_target;

/* The rows of x, wherever they are, read once for all targets (q, k and v of the same input). */
typedef struct {
    size_t rows;
    const char *const *row; /* [rows]: address of feature 0 */
    ptrdiff_t stride_e;     /* bytes between features */
    size_t targets;
    mha_target target[MHA_TARGETS];
} mha_projection;

/* Copies features of `item` bytes each, stride_e bytes apart, side by side. */
void mha_copy_row(const char *x, ptrdiff_t stride_e, size_t features, size_t item, char *to);

/* Bytes of scratch that each thread needs to run any of these. */
size_t mha_projection_scratch(const mha_kernels *kernels, const mha_projection *projections, size_t count);

/* Runs `count` projections side by side; scratch is `threads` pieces of scratch_bytes. */
mha_status mha_project(const mha_kernels *kernels, const mha_projection *projections, size_t count, size_t threads,
                       char *scratch, size_t scratch_bytes, mha_stop stop);

#endif
