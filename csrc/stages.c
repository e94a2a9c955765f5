/* SPDX-License-Identifier: Apache-2.0
 *
 * stages.c - parts of the pass by themselves, for mha_c.explain.
 *
 * Owns: nothing.
 */
#include <string.h>

#include "few_queries.h"
#include "projection.h"
#include "spare.h"

mha_status mha_choose_paths(const mha_layer *layer, const mha_call *call, bool *is_few)
{
    mha_items items;
    const mha_status status = mha_list_items(call, mha_extra_keys(layer, call), &items);
    if (status == MHA_OK) {
        mha_pick_few_queries(layer, call, &items);
        memcpy(is_few, items.is_picked, call->N * sizeof *is_few);
    }
    mha_release(items.memory);
    return status;
}

mha_status mha_project_input(const mha_input_projection *input)
{
    const mha_layer *layer = input->layer;
    const mha_panels *panels = input->input == MHA_QUERY ? &layer->q : input->input == MHA_KEY ? &layer->k : &layer->v;
    const mha_walk walk = {.items = input->N, .length = input->length};
    mha_projection projection = {.walk = &walk, .x = &input->x, .targets = 1,
                                 .target = {{panels, &input->y, 0, panels->split.width}}};
    mha_team team = {.threads = input->threads, .stop = input->stop};
    mha_plan plan;
    mha_begin_plan(&plan);
    char *workspace = NULL;
    size_t rows;
    if (__builtin_mul_overflow(input->N, input->length, &rows))
        return MHA_TOO_LARGE;
    team.scratch_bytes = mha_plan_projection(layer->kernels, &projection, team.threads);
    mha_place(&plan, &team.scratch, team.threads, team.scratch_bytes, 1);
    mha_status status = mha_take_workspace(&plan, &workspace);
    if (status == MHA_OK)
        status = mha_project(layer->kernels, &projection, 1, &team);
    mha_give_workspace(workspace);
    return status;
}
