/* SPDX-License-Identifier: Apache-2.0
 *
 * pass.h - a pass over items of a call: what each of its steps is about, and what each hands to the next.
 */
#ifndef MHA_PASS_H
#define MHA_PASS_H

#include "block.h"
#include "few_queries.h"
#include "layer.h"
#include "projection.h"

/* What the passes of a call have in common. */
typedef struct {
    const mha_layer *layer;
    const mha_call *call;
    mha_rules rules;
    mha_items *items; /* few_queries.c takes those that are picked */
    bool is_few;      /* whether a pass is over these */
    mha_saved *saved; /* results of few_queries.c that are put back after the next pass */
} mha_passes;

/* Rows of the call are reached by an item's index, those of the workspace by its place in the batch. */
typedef struct {
    const mha_passes *passes;
    const mha_batch *batch;
    mha_team team;
    mha_walk queries, key_rows, results;
    const mha_walk *keys; /* key_rows; or queries, if padded rows are not computed; NULL if is_few */
    bool by_rows;         /* how the walks through the inputs go */
    mha_rows query, key, value, output;
    mha_projection inputs[MHA_TARGETS], last;
    size_t input_count;
    mha_attention attention; /* its q, k, v and context are what the steps hand on */
    mha_few_queries few;
    mha_block_pass block; /* where the call has one */
} mha_pass;

/* Describes a pass over some items, and plans its workspace. `passes` and the batch stay where they are meanwhile. */
void mha_plan_pass(mha_pass *p, const mha_passes *passes, const mha_batch *batch, const mha_team *team, mha_plan *plan);

#endif
