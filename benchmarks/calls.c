/* SPDX-License-Identifier: Apache-2.0
 *
 * calls.c - inputs, masks and weights of a described call.
 */
#include "calls.h"

#include <stdlib.h>
#include <string.h>

#include "cpu.h"

void *allocate(size_t bytes)
{
    void *x = NULL;
    if (posix_memalign(&x, 64, bytes ? bytes : 1) != 0)
        abort();
    memset(x, 0, bytes);
    return x;
}

void *numbers(mha_dtype dtype, size_t count)
{
    void *x = allocate(count * mha_size_of(dtype));
    if (mha_is_half(dtype)) {
        void *wide = numbers(MHA_FLOAT32, count);
        mha_cpu_kernels(dtype)->narrow(dtype, wide, count, x);
        free(wide);
        return x;
    }
    for (size_t i = 0; i < count; i++) {
        const double value = (double)(i * 2654435761u % 2001) / 1000 - 1;
        if (dtype == MHA_FLOAT32)
            ((float *)x)[i] = (float)value;
        else
            ((double *)x)[i] = value;
    }
    return x;
}

static mha_rows input(const described_call *c, size_t length, size_t features)
{
    const mha_dtype type = mha_computed_in(c->dtype);
    return mha_contiguous_rows(numbers(type, c->N * length * features), type, 1, length, features);
}

static mha_mask attention_mask(const described_call *c)
{
    if (c->attn == MHA_MASK_NONE)
        return (mha_mask){0};
    const ptrdiff_t size = c->attn == MHA_MASK_FLOAT32 ? (ptrdiff_t)sizeof(float) : 1;
    const ptrdiff_t row = (ptrdiff_t)c->S * size, matrix = (ptrdiff_t)c->L * row;
    const size_t count = (c->per_head ? c->N * c->H : 1) * c->L * c->S;
    mha_mask mask = {.kind = c->attn, .stride_l = row, .stride_s = size};
    if (c->per_head) {
        mask.stride_n = (ptrdiff_t)c->H * matrix;
        mask.stride_h = matrix;
    }
    if (c->attn == MHA_MASK_FLOAT32) {
        mask.data = numbers(MHA_FLOAT32, count);
        return mask;
    }
    char *hidden = allocate(count);
    for (size_t i = 0; i < count; i++)
        hidden[i] = i % 7 == 3;
    mask.data = hidden;
    return mask;
}

static mha_mask padding_mask(const described_call *c)
{
    if (c->live[0] == 0)
        return (mha_mask){0};
    if (c->N > MAX_ITEMS)
        abort();
    char *hidden = allocate(c->N * c->S);
    for (size_t n = 0; n < c->N; n++)
        memset(hidden + n * c->S + c->live[n], 1, c->S - c->live[n]);
    return (mha_mask){hidden, MHA_MASK_HIDE, (ptrdiff_t)c->S, 0, 0, 1};
}

static mha_weight make_weight(const described_call *c, size_t features, size_t depth)
{
    /* any bytes are numbers of int8 */
    const void *weight = numbers(c->dtype, features * depth);
    return (mha_weight){.numbers = weight, .scale = c->is_int8 ? numbers(MHA_FLOAT32, features) : NULL,
                        .is_bf16 = c->is_bf16};
}

static mha_layer *make_layer(const described_call *c)
{
    const size_t D = c->E / c->H, kv = c->Hkv * D;
    const mha_widths widths = {c->H, c->Hkv, D, D, c->E, c->Ek, c->Ev, c->E};
    const mha_parameters parameters = {
        .q_weight = make_weight(c, c->E, c->E), .k_weight = make_weight(c, kv, c->Ek),
        .v_weight = make_weight(c, kv, c->Ev), .out_weight = make_weight(c, c->E, c->E),
        .q_bias = numbers(c->dtype, c->E), .k_bias = numbers(c->dtype, kv), .v_bias = numbers(c->dtype, kv),
        .out_bias = numbers(c->dtype, c->E), .is_attention_bf16 = c->is_bf16 || c->is_int8,
    };
    mha_layer *layer = NULL;
    if (mha_layer_create(&widths, c->dtype, &parameters, &layer) != MHA_OK)
        abort();
    return layer;
}

static mha_linear *make_linear(const described_call *c, size_t features, size_t depth)
{
    mha_linear *linear = NULL;
    const mha_weight weight = make_weight(c, features, depth);
    if (mha_linear_create(c->dtype, features, depth, &weight, numbers(c->dtype, features), &linear) != MHA_OK)
        abort();
    return linear;
}

static mha_block *make_block(const described_call *c)
{
    const mha_dtype type = mha_computed_in(c->dtype);
    const mha_norm norm = {.weight = numbers(type, c->E), .bias = numbers(type, c->E), .eps = 1e-5};
    mha_block *block = allocate(sizeof *block);
    *block = (mha_block){.is_self_attention = true, .zeroes_padding = c->live[0] > 0, .attention_norm = norm,
                         .feed_forward_norm = norm, .linear1 = make_linear(c, c->F, c->E),
                         .linear2 = make_linear(c, c->E, c->F), .activation = MHA_GELU};
    return block;
}

prepared_call prepare_call(const described_call *c)
{
    const mha_rows query = input(c, c->L, c->E);
    const mha_rows key = c->L == c->S && c->E == c->Ek ? query : input(c, c->S, c->Ek);
    const mha_rows value = c->Ek == c->Ev ? key : input(c, c->S, c->Ev);
    const mha_call call = {
        .N = c->N, .L = c->L, .S = c->S, .query = query, .key = key, .value = value,
        .attn_mask = attention_mask(c), .key_padding_mask = padding_mask(c), .is_causal = c->is_causal,
        .dropout_p = c->dropout_p, .output = input(c, c->L, c->E), .wanted = c->wanted,
        .attn_weights = allocate(c->N * c->L * c->S * mha_size_of(mha_computed_in(c->dtype))), .threads = 1,
        .block = c->F > 0 ? make_block(c) : NULL,
    };
    return (prepared_call){make_layer(c), call};
}
