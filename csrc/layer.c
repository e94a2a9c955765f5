/* SPDX-License-Identifier: Apache-2.0
 *
 * layer.c - packs parameters into panels for the kernels of this CPU, once, when a layer is loaded.
 *
 * Owns: the memory of mha_layer.
 */
#include "layer.h"

#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "workspace.h"

/* The offsets of a matrix and its bias in the layer's memory. */
typedef struct {
    size_t data, bias;
} offsets;

static offsets reserve_panels(mha_layout *layout, const mha_kernels *kernels, mha_panels *panels, size_t features,
                              size_t depth)
{
    panels->split = mha_split_width(kernels, features);
    panels->depth = depth;
    const size_t padded = panels->split.vectors * kernels->lanes;
    return (offsets){.data = mha_reserve(layout, padded, depth, kernels->size),
                     .bias = mha_reserve(layout, padded, 1, kernels->size)};
}

static void pack_panels(const mha_kernels *kernels, mha_panels *panels, char *memory, offsets at, const char *weight,
                        const char *bias)
{
    const mha_split *split = &panels->split;
    const size_t size = kernels->size, depth = panels->depth;
    for (size_t i = 0; i < split->panels; i++) {
        const mha_panel panel = mha_panel_at(split, i);
        kernels->pack_panel(weight + panel.first * depth * size, depth, panel.count, depth, 1,
                            memory + at.data + panel.first * depth * size, panel.vectors);
    }
    panels->data = memory + at.data;
    if (bias) {
        memset(memory + at.bias, 0, split->vectors * kernels->lanes * size);
        memcpy(memory + at.bias, bias, split->width * size);
        panels->bias = memory + at.bias;
    }
}

static const char *copy(char *memory, size_t offset, const void *from, size_t bytes)
{
    return from ? memcpy(memory + offset, from, bytes) : NULL;
}

mha_status mha_layer_create(const mha_widths *widths, mha_dtype dtype, const mha_parameters *given,
                            mha_layer **layer)
{
    const mha_widths w = *widths;
    const mha_kernels *kernels = mha_cpu_kernels(dtype);
    const size_t size = kernels->size;
    mha_layout layout = {0};
    mha_status status = MHA_NO_MEMORY;
    mha_layer *made = calloc(1, sizeof *made);
    if (!made)
        goto done;
    const offsets q = reserve_panels(&layout, kernels, &made->q, w.H * w.D, w.E);
    const offsets k = reserve_panels(&layout, kernels, &made->k, w.Hkv * w.D, w.Ek);
    const offsets v = reserve_panels(&layout, kernels, &made->v, w.Hkv * w.Dv, w.Ev);
    const offsets out = reserve_panels(&layout, kernels, &made->out, w.Eo, w.H * w.Dv);
    const size_t bias_k = mha_reserve(&layout, w.Hkv, w.D, size), bias_v = mha_reserve(&layout, w.Hkv, w.Dv, size);
    status = mha_allocate(&layout, &made->memory);
    if (status != MHA_OK)
        goto done;
    made->widths = w;
    made->kernels = kernels;
    made->bytes = layout.bytes;
    made->k_weight = given->k_weight;
    pack_panels(kernels, &made->q, made->memory, q, given->q_weight, given->q_bias);
    pack_panels(kernels, &made->k, made->memory, k, given->k_weight, given->k_bias);
    pack_panels(kernels, &made->v, made->memory, v, given->v_weight, given->v_bias);
    pack_panels(kernels, &made->out, made->memory, out, given->out_weight, given->out_bias);
    made->bias_k = copy(made->memory, bias_k, given->bias_k, w.Hkv * w.D * size);
    made->bias_v = copy(made->memory, bias_v, given->bias_v, w.Hkv * w.Dv * size);
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

size_t mha_extra_keys(const mha_layer *layer, const mha_call *call)
{
    return (layer->bias_k != NULL) + (size_t)call->add_zero_attn;
}
