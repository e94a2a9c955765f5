/* SPDX-License-Identifier: Apache-2.0
 *
 * stages.c - parts of the pass by themselves, for mha_c.explain.
 *
 * Owns: nothing.
 */
#include <string.h>

#include "cpu.h"
#include "few_queries.h"
#include "projection.h"
#include "rowwise.h"
#include "spare.h"

mha_status mha_choose_paths(const mha_layer *layer, const mha_call *call, bool *is_few)
{
    mha_items items;
    const mha_status status =
        mha_list_items(call->N, call->S, &call->key_padding_mask, mha_extra_keys(layer, call), &items);
    if (status == MHA_OK) {
        mha_pick_few_queries(layer, call, &items);
        memcpy(is_few, items.is_picked, call->N * sizeof *is_few);
    }
    mha_release(items.memory);
    return status;
}

static mha_status project_alone(const mha_kernels *kernels, mha_projection *projection, size_t threads,
                                const mha_stop *stop)
{
    mha_team team = {.threads = threads, .stop = *stop};
    mha_plan plan;
    mha_begin_plan(&plan);
    char *workspace = NULL;
    team.scratch_bytes = mha_plan_projection(kernels, projection, threads);
    mha_place(&plan, &team.scratch, threads, team.scratch_bytes, 1);
    mha_status status = mha_take_workspace(&plan, &workspace);
    if (status == MHA_OK)
        status = mha_project(kernels, projection, 1, &team);
    mha_give_workspace(workspace);
    return status;
}

double mha_linear_operations(const mha_linear_call *call)
{
    const mha_panels *panels = &call->linear->panels;
    return 2 * (double)call->rows * (double)panels->split.width * (double)panels->depth;
}

mha_status mha_apply_linear(const mha_linear_call *call)
{
    const mha_linear *linear = call->linear;
    const mha_dtype type = linear->kernels->dtype;
    const mha_rows x = mha_contiguous_rows((void *)call->x, type, 1, call->rows, linear->panels.depth);
    const mha_rows y = mha_contiguous_rows(call->y, type, 1, call->rows, linear->panels.split.width);
    const mha_walk walk = {.items = 1, .length = call->rows};
    mha_projection projection = {.walk = &walk, .x = &x, .targets = 1,
                                 .target = {{&linear->panels, &y, 0, linear->panels.split.width}}};
    return project_alone(linear->kernels, &projection, call->threads, &call->stop);
}

/* A number goes through about thirty operations. */
double mha_activation_operations(const mha_activation_call *call)
{
    return 30 * (double)call->rows * (double)call->width;
}

mha_status mha_apply_activation(const mha_activation_call *call)
{
    const mha_kernels *kernels = mha_cpu_kernels(call->dtype);
    const size_t distance = call->width * kernels->size;
    const mha_activated_rows rows = {.kernels = kernels, .activation = call->activation, .is_gated = call->is_gated,
                                     .rows = call->rows, .width = call->width, .x = call->x,
                                     .x_distance = call->is_gated ? 2 * distance : distance, .y = call->y,
                                     .y_distance = distance};
    const mha_team team = {.threads = call->threads, .stop = call->stop};
    return mha_activate_rows(&rows, &team);
}

mha_status mha_project_input(const mha_input_projection *input)
{
    const mha_layer *layer = input->layer;
    const mha_panels *panels = input->input == MHA_QUERY ? &layer->q : input->input == MHA_KEY ? &layer->k : &layer->v;
    const mha_walk walk = {.items = input->N, .length = input->length};
    mha_projection projection = {.walk = &walk, .x = &input->x, .targets = 1,
                                 .target = {{panels, &input->y, 0, panels->split.width}}};
    size_t rows;
    if (__builtin_mul_overflow(input->N, input->length, &rows))
        return MHA_TOO_LARGE;
    return project_alone(layer->kernels, &projection, input->threads, &input->stop);
}
