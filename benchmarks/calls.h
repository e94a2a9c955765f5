/* SPDX-License-Identifier: Apache-2.0
 *
 * calls.h - forward passes described in a few numbers, for the drivers that look into the core.
 */
#ifndef CALLS_H
#define CALLS_H

#include "mha.h"

enum { MAX_ITEMS = 64 };

typedef struct {
    size_t N, L, S, E, Ek, Ev, H, Hkv;
    mha_dtype dtype;
    mha_mask_kind attn; /* numbers, or one key of seven hidden; */
    bool per_head;      /* (N, H, L, S), else (L, S) */
    size_t live[MAX_ITEMS]; /* keys of each item, a key_padding_mask hides the rest; first 0: no such mask */
    bool is_causal;
    mha_wanted wanted;
    double dropout_p;
    bool is_bf16; /* products of linear maps, and attention's own, are of bfloat16 */
    bool is_int8; /* products of linear maps are of int8, and attention's own of bfloat16 */
    size_t F; /* hidden features of a layer of a Transformer with gelu, which skips padding; 0: attention alone */
} described_call;

/* Memory on a cache line of its own; the process ends where there is none. */
void *allocate(size_t bytes);

/* Numbers in [-1, 1], the same in every run. */
void *numbers(mha_dtype dtype, size_t count);

/* Inputs of a layer of its own, and the pass, on one thread. Query is key where L is S and the widths agree, and key is
 * value where the widths agree. Nothing is released: the process is about to end. */
typedef struct {
    mha_layer *layer;
    mha_call call;
} prepared_call;

prepared_call prepare_call(const described_call *c);

#endif
