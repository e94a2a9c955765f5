/* SPDX-License-Identifier: Apache-2.0
 *
 * block.h - what a layer of a Transformer does around attention: residual connections, norms, the feed-forward network.
 */
#ifndef MHA_BLOCK_H
#define MHA_BLOCK_H

#include "layer.h"
#include "rowwise.h"

/* The members before `normal` are set by the pass. */
typedef struct {
    const mha_block *block;
    const mha_kernels *kernels;
    const mha_walk *walk; /* the rows that are computed */
    const mha_team *team;
    size_t width;       /* E */
    mha_rows x, output; /* of the call */

    mha_rows normal;   /* norms of rows, if they come first */
    mha_rows attended; /* what attention gives; later y, as mha_block says */
    mha_rows change;   /* what the feed-forward network gives */
    mha_rows hidden;   /* its hidden features, of some rows at a time */
} mha_block_pass;

/* Places the rows, and returns the bytes of scratch that each thread needs. */
size_t mha_plan_block(mha_block_pass *b, mha_plan *plan);

/* Fills `normal`, if norms come first. */
mha_status mha_begin_block(const mha_block_pass *b);

/* Makes the output of what attention gave. */
mha_status mha_end_block(const mha_block_pass *b, const mha_batch *batch);

#endif
