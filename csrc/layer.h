/* SPDX-License-Identifier: Apache-2.0
 *
 * layer.h - the packed parameters of a layer, as the core sees them.
 */
#ifndef MHA_LAYER_H
#define MHA_LAYER_H

#include "mha.h"
#include "panels.h"

struct mha_layer {
    mha_widths widths;
    const mha_kernels *kernels;
    mha_panels q, k, v, out;
    const mha_narrow_kernels *narrow_attention; /* of attention itself; NULL: its products are not narrow */
    bool has_bias_kv;
    /* The same for every item: a row of bias_k and bias_v if the layer has them, then a row of zeros. */
    mha_rows extra_k, extra_v;
    const void *k_weight;    /* as given: few_queries.c reads its rows */
    mha_dtype k_weight_type; /* of its numbers; not used if they are int8 */
    char *memory;            /* holds the panels and the extra rows */
};

struct mha_linear {
    const mha_kernels *kernels;
    mha_panels panels;
    char *memory;
};

#endif
