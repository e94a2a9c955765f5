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

static void place_panels(mha_plan *plan, const mha_kernels *kernels, mha_panels *panels, mha_dtype type,
                         const mha_weight *weight, size_t features, size_t depth, bool has_bias)
{
    const mha_narrow_kernels *narrow = weight->scale     ? mha_cpu_narrow(MHA_INT8)
                                       : weight->is_bf16 ? mha_cpu_narrow(MHA_BF16)
                                                         : NULL;
    panels->narrow = narrow;
    panels->split = mha_split_evenly(kernels, features, narrow ? narrow->vectors : kernels->vectors);
    panels->depth = depth;
    panels->type = weight->is_bf16 ? MHA_BFLOAT16 : type;
    panels->group_log2 = narrow ? (unsigned)__builtin_ctzl(narrow->group) : 0;
    panels->group_bytes = narrow ? narrow->group_bytes : mha_size_of(type);
    const size_t padded = panels->split.vectors * kernels->lanes;
    mha_place(plan, &panels->data, padded, mha_groups(panels, depth), panels->group_bytes);
    if (weight->scale)
        mha_place(plan, &panels->scale, padded, 1, sizeof *panels->scale);
    if (has_bias)
        mha_place(plan, &panels->bias, padded, 1, kernels->size);
}

/* Copies parameters, halves as float32. */
static void take_numbers(const mha_kernels *kernels, mha_dtype type, const char *numbers, size_t n, char *to)
{
    if (mha_is_half(type))
        kernels->widen(type, numbers, n, to);
    else
        memcpy(to, numbers, n * kernels->size);
}

/* Halves are packed chain by chain, since kernels move float32 alone. Their values do not change. */
static void pack_halves(const mha_kernels *kernels, const mha_panels *panels, mha_panel panel, const char *weight)
{
    float rows[MHA_MAX_LANES][MHA_CHAIN], chain[MHA_CHAIN * MHA_MAX_LANES];
    const size_t size = mha_size_of(panels->type), P = panel.vectors * kernels->lanes, depth = panels->depth;
    char *to = mha_panel_row(panels, &panel, 0);
    for (size_t k = 0; k < depth; k += MHA_CHAIN) {
        const size_t width = mha_smaller(depth - k, MHA_CHAIN);
        for (size_t i = 0; i < panel.count; i++)
            kernels->widen(panels->type, weight + ((panel.first + i) * depth + k) * size, width, rows[i]);
        kernels->pack_panel(rows, MHA_CHAIN, panel.count, width, 1, chain, panel.vectors);
        kernels->narrow(panels->type, chain, width * P, to + k * P * size);
    }
}

static void pack_int8(const mha_panels *panels, mha_panel panel, const int8_t *weight)
{
    const size_t P = panel.vectors * panels->split.lanes, group = panels->narrow->group, depth = panels->depth;
    int8_t *to = (int8_t *)mha_panel_row(panels, &panel, 0);
    memset(to, 0, mha_groups(panels, depth) * P * group);
    for (size_t i = 0; i < panel.count; i++) {
        const int8_t *row = weight + (panel.first + i) * depth;
        for (size_t k = 0; k < depth; k++)
            to[((k >> panels->group_log2) * P + i) * group + (k & (group - 1))] =
                (int8_t)(row[k] + panels->narrow->weight_offset);
    }
}

/* Weights are rounded as rows are. Where bfloat16 is multiplied by FMAs, a group is the upper half of a word. */
static void pack_bf16(const mha_kernels *kernels, const mha_panels *panels, mha_dtype type, mha_panel panel,
                      const char *weight)
{
    float numbers[MHA_CHAIN];
    uint32_t words[MHA_CHAIN];
    const size_t P = panel.vectors * panels->split.lanes, depth = panels->depth, size = mha_size_of(type);
    memset(mha_panel_row(panels, &panel, 0), 0, mha_groups(panels, depth) * P * panels->group_bytes);
    for (size_t i = 0; i < panel.count; i++)
        for (size_t k = 0; k < depth; k += MHA_CHAIN) {
            const size_t width = mha_smaller(depth - k, MHA_CHAIN);
            char *to = mha_panel_row(panels, &panel, k);
            take_numbers(kernels, type, weight + ((panel.first + i) * depth + k) * size, width, (char *)numbers);
            panels->narrow->take_row(numbers, width, 0, words);
            for (size_t step = 0; step < mha_groups(panels, width); step++) {
                const uint16_t upper = (uint16_t)(words[step] >> 16);
                const void *group = panels->group_log2 == 0 ? (const void *)&upper : (const void *)&words[step];
                memcpy(to + (step * P + i) * panels->group_bytes, group, panels->group_bytes);
            }
        }
}

static void pack_panels(const mha_kernels *kernels, const mha_panels *panels, mha_dtype type,
                        const mha_weight *weight, const char *bias)
{
    const mha_split *split = &panels->split;
    const size_t size = kernels->size, depth = panels->depth;
    for (size_t i = 0; i < split->panels; i++) {
        const mha_panel panel = mha_panel_at(split, i);
        if (weight->scale)
            pack_int8(panels, panel, weight->numbers);
        else if (weight->is_bf16)
            pack_bf16(kernels, panels, type, panel, weight->numbers);
        else if (mha_is_half(panels->type))
            pack_halves(kernels, panels, panel, weight->numbers);
        else
            kernels->pack_panel((const char *)weight->numbers + panel.first * depth * size, depth, panel.count, depth,
                                1, mha_panel_row(panels, &panel, 0), panel.vectors);
    }
    if (weight->scale) {
        memset(panels->scale, 0, split->vectors * kernels->lanes * sizeof *panels->scale);
        memcpy(panels->scale, weight->scale, split->width * sizeof *panels->scale);
    }
    if (bias) {
        memset(panels->bias, 0, split->vectors * kernels->lanes * size);
        take_numbers(kernels, type, bias, split->width, panels->bias);
    }
}

static void place_extra(mha_plan *plan, const mha_kernels *kernels, mha_rows *rows, size_t heads, size_t width)
{
    const ptrdiff_t size = (ptrdiff_t)kernels->size, head = (ptrdiff_t)width * size;
    *rows = (mha_rows){.type = kernels->dtype, .head = head, .row = (ptrdiff_t)heads * head, .element = size};
    mha_place(plan, &rows->data, 2 * heads, width, kernels->size);
}

static void fill_extra(const mha_kernels *kernels, mha_dtype type, const mha_rows *rows, const void *given)
{
    char *zeros = rows->data;
    if (given) {
        take_numbers(kernels, type, given, (size_t)rows->row / kernels->size, zeros);
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
    place_panels(&plan, kernels, &made->q, dtype, &given->q_weight, w.H * w.D, w.E, given->q_bias != NULL);
    place_panels(&plan, kernels, &made->k, dtype, &given->k_weight, w.Hkv * w.D, w.Ek, given->k_bias != NULL);
    place_panels(&plan, kernels, &made->v, dtype, &given->v_weight, w.Hkv * w.Dv, w.Ev, given->v_bias != NULL);
    place_panels(&plan, kernels, &made->out, dtype, &given->out_weight, w.Eo, w.H * w.Dv, given->out_bias != NULL);
    place_extra(&plan, kernels, &made->extra_k, w.Hkv, w.D);
    place_extra(&plan, kernels, &made->extra_v, w.Hkv, w.Dv);
    status = mha_allocate(&plan, &made->memory);
    if (status != MHA_OK)
        goto done;
    made->widths = w;
    made->kernels = kernels;
    made->narrow_attention = given->is_attention_bf16 ? mha_cpu_narrow(MHA_BF16) : NULL;
    made->k_weight = given->k_weight.numbers;
    made->k_weight_type = dtype;
    pack_panels(kernels, &made->q, dtype, &given->q_weight, given->q_bias);
    pack_panels(kernels, &made->k, dtype, &given->k_weight, given->k_bias);
    pack_panels(kernels, &made->v, dtype, &given->v_weight, given->v_bias);
    pack_panels(kernels, &made->out, dtype, &given->out_weight, given->out_bias);
    made->has_bias_kv = given->bias_k != NULL;
    fill_extra(kernels, dtype, &made->extra_k, given->bias_k);
    fill_extra(kernels, dtype, &made->extra_v, given->bias_v);
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

mha_status mha_linear_create(mha_dtype dtype, size_t features, size_t depth, const mha_weight *weight, const void *bias,
                             mha_linear **linear)
{
    const mha_kernels *kernels = mha_cpu_kernels(dtype);
    mha_plan plan;
    mha_begin_plan(&plan);
    mha_status status = MHA_NO_MEMORY;
    mha_linear *made = calloc(1, sizeof *made);
    if (made) {
        made->kernels = kernels;
        place_panels(&plan, kernels, &made->panels, dtype, weight, features, depth, bias != NULL);
        status = mha_allocate(&plan, &made->memory);
    }
    if (status == MHA_OK) {
        pack_panels(kernels, &made->panels, dtype, weight, bias);
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
