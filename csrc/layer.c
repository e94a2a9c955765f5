/* SPDX-License-Identifier: Apache-2.0
 *
 * layer.c - packs parameters into panels for the kernels of this CPU, once, when a layer is loaded.
 *
 * Owns: the memory of mha_layer and mha_linear.
 */
#include "layer.h"

#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "workspace.h"

static void place_panels(mha_plan *plan, const mha_kernels *kernels, mha_panels *panels, size_t features, size_t depth,
                         bool has_bias)
{
    panels->split = mha_split_width(kernels, features);
    panels->depth = depth;
    const size_t padded = panels->split.vectors * kernels->lanes;
    mha_place(plan, &panels->data, padded, depth, kernels->size);
    if (has_bias)
        mha_place(plan, &panels->bias, padded, 1, kernels->size);
}

static void pack_panels(const mha_kernels *kernels, const mha_panels *panels, const char *weight, const char *bias)
{
    const mha_split *split = &panels->split;
    const size_t size = kernels->size, depth = panels->depth;
    for (size_t i = 0; i < split->panels; i++) {
        const mha_panel panel = mha_panel_at(split, i);
        kernels->pack_panel(weight + panel.first * depth * size, depth, panel.count, depth, 1,
                            panels->data + panel.first * depth * size, panel.vectors);
    }
    if (bias) {
        memset(panels->bias, 0, split->vectors * kernels->lanes * size);
        memcpy(panels->bias, bias, split->width * size);
    }
}

static void place_extra(mha_plan *plan, const mha_kernels *kernels, mha_rows *rows, size_t heads, size_t width)
{
    const ptrdiff_t size = (ptrdiff_t)kernels->size, head = (ptrdiff_t)width * size;
    *rows = (mha_rows){.type = kernels->dtype, .head = head, .row = (ptrdiff_t)heads * head, .step = size};
    mha_place(plan, &rows->data, 2 * heads, width, kernels->size);
}

static void fill_extra(const mha_rows *rows, const void *given)
{
    char *zeros = rows->data;
    if (given) {
        memcpy(zeros, given, (size_t)rows->row);
        zeros += rows->row;
    }
    memset(zeros, 0, (size_t)rows->row);
}

mha_status mha_layer_create(const mha_widths *widths, mha_dtype dtype, const mha_parameters *given,
                            mha_layer **layer)
{
    const mha_widths w = *widths;
    const mha_kernels *kernels = mha_cpu_kernels(dtype);
    mha_plan plan;
    mha_begin_plan(&plan);
    mha_status status = MHA_NO_MEMORY;
    mha_layer *made = calloc(1, sizeof *made);
    if (!made)
        goto done;
    place_panels(&plan, kernels, &made->q, w.H * w.D, w.E, given->q_bias != NULL);
    place_panels(&plan, kernels, &made->k, w.Hkv * w.D, w.Ek, given->k_bias != NULL);
    place_panels(&plan, kernels, &made->v, w.Hkv * w.Dv, w.Ev, given->v_bias != NULL);
    place_panels(&plan, kernels, &made->out, w.Eo, w.H * w.Dv, given->out_bias != NULL);
    place_extra(&plan, kernels, &made->extra_k, w.Hkv, w.D);
    place_extra(&plan, kernels, &made->extra_v, w.Hkv, w.Dv);
    status = mha_allocate(&plan, &made->memory);
    if (status != MHA_OK)
        goto done;
    made->widths = w;
    made->kernels = kernels;
    made->k_weight = given->k_weight;
    pack_panels(kernels, &made->q, given->q_weight, given->q_bias);
    pack_panels(kernels, &made->k, given->k_weight, given->k_bias);
    pack_panels(kernels, &made->v, given->v_weight, given->v_bias);
    pack_panels(kernels, &made->out, given->out_weight, given->out_bias);
    made->has_bias_kv = given->bias_k != NULL;
    fill_extra(&made->extra_k, given->bias_k);
    fill_extra(&made->extra_v, given->bias_v);
done:
    if (status != MHA_OK) {
        mha_layer_destroy(made);
        made = NULL;
    }
    *layer = made;
    return status;
}

void mha_layer_destroy(mha_layer *layer)
{
    if (layer)
        mha_release(layer->memory);
    free(layer);
}

mha_status mha_linear_create(mha_dtype dtype, size_t features, size_t depth, const void *weight, const void *bias,
                             mha_linear **linear)
{
    const mha_kernels *kernels = mha_cpu_kernels(dtype);
    mha_plan plan;
    mha_begin_plan(&plan);
    mha_status status = MHA_NO_MEMORY;
    mha_linear *made = calloc(1, sizeof *made);
    if (made) {
        made->kernels = kernels;
        place_panels(&plan, kernels, &made->panels, features, depth, bias != NULL);
        status = mha_allocate(&plan, &made->memory);
    }
    if (status == MHA_OK) {
        pack_panels(kernels, &made->panels, weight, bias);
    } else {
        mha_linear_destroy(made);
        made = NULL;
    }
    *linear = made;
    return status;
}

void mha_linear_destroy(mha_linear *linear)
{
    if (linear)
        mha_release(linear->memory);
    free(linear);
}

size_t mha_extra_keys(const mha_layer *layer, const mha_call *call)
{
    return (size_t)layer->has_bias_kv + (size_t)call->add_zero_attn;
}
