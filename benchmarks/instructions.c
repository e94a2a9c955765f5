/* SPDX-License-Identifier: Apache-2.0
 *
 * instructions.c - one forward pass of a kind, for instructions.py to count its instructions.
 *
 * Without an argument it prints the names of the calls, with one it makes that call, on one thread.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "mha.h"

/* Large enough that the kernels dominate where they should, small enough for a second under valgrind. */
typedef struct {
    const char *name;
    size_t N, L, S, E, H, Hkv;
    mha_dtype dtype;
    mha_mask_kind attn, padding; /* padding hides the last half of the keys of every other item */
    bool is_causal;
    mha_weights_wanted wanted;
    double dropout_p;
} counted_call;

static const counted_call calls[] = {
    {"tiny", 3, 5, 5, 8, 4, 4, .dtype = MHA_FLOAT32},
    {"tiny with weights", 1, 16, 16, 64, 4, 4, .wanted = MHA_WEIGHTS_AVERAGED},
    {"short, 32 to a head", 1, 32, 32, 384, 12, 12, .dtype = MHA_FLOAT32},
    {"encoder, 64 to a head", 1, 128, 128, 384, 6, 6, .dtype = MHA_FLOAT32},
    {"ragged, 24 to a head", 3, 77, 77, 120, 5, 5, .dtype = MHA_FLOAT32},
    {"one wide head", 1, 64, 64, 256, 1, 1, .dtype = MHA_FLOAT32},
    {"causal", 1, 256, 256, 128, 2, 2, .is_causal = true},
    {"padded", 4, 128, 128, 128, 2, 2, .padding = MHA_MASK_HIDE},
    {"float mask", 1, 128, 128, 128, 2, 2, .attn = MHA_MASK_FLOAT32},
    {"boolean mask", 1, 128, 128, 128, 2, 2, .attn = MHA_MASK_HIDE},
    {"few queries", 1, 1, 512, 256, 4, 4, .dtype = MHA_FLOAT32},
    {"averaged weights", 2, 64, 64, 128, 2, 2, .wanted = MHA_WEIGHTS_AVERAGED},
    {"grouped heads", 1, 128, 128, 256, 4, 1, .dtype = MHA_FLOAT32},
    {"dropout", 1, 64, 64, 128, 2, 2, .dropout_p = 0.1},
    {"float64", 1, 96, 96, 128, 2, 2, .dtype = MHA_FLOAT64},
};
enum { CALLS = sizeof calls / sizeof *calls };

static void *allocate(size_t bytes)
{
    void *x = calloc(bytes ? bytes : 1, 1);
    if (x == NULL)
        abort();
    return x;
}

/* Numbers in [-1, 1], the same in every run. */
static void *numbers(mha_dtype dtype, size_t count)
{
    void *x = allocate(count * (dtype == MHA_FLOAT32 ? sizeof(float) : sizeof(double)));
    for (size_t i = 0; i < count; i++) {
        const double value = (double)(i * 2654435761u % 2001) / 1000 - 1;
        if (dtype == MHA_FLOAT32)
            ((float *)x)[i] = (float)value;
        else
            ((double *)x)[i] = value;
    }
    return x;
}

static mha_mask attention_mask(const counted_call *c)
{
    if (c->attn == MHA_MASK_NONE)
        return (mha_mask){0};
    const bool is_float = c->attn == MHA_MASK_FLOAT32;
    const ptrdiff_t item = is_float ? (ptrdiff_t)sizeof(float) : 1;
    char *hidden = allocate(c->L * c->S);
    for (size_t i = 0; i < c->L * c->S; i++)
        hidden[i] = i % 7 == 3;
    return (mha_mask){is_float ? numbers(MHA_FLOAT32, c->L * c->S) : hidden, c->attn, 0, 0, (ptrdiff_t)c->S * item,
                      item};
}

static mha_mask padding_mask(const counted_call *c)
{
    if (c->padding == MHA_MASK_NONE)
        return (mha_mask){0};
    char *hidden = allocate(c->N * c->S);
    for (size_t n = 1; n < c->N; n += 2)
        memset(hidden + n * c->S + c->S / 2, 1, c->S - c->S / 2);
    return (mha_mask){hidden, c->padding, (ptrdiff_t)c->S, 0, 0, 1};
}

static mha_weights *make_weights(const counted_call *c)
{
    const size_t D = c->E / c->H, kv = c->Hkv * D;
    const mha_widths widths = {c->H, c->Hkv, D, D, c->E, c->E, c->E, c->E};
    const mha_parameters parameters = {
        .q_weight = numbers(c->dtype, c->E * c->E), .k_weight = numbers(c->dtype, kv * c->E),
        .v_weight = numbers(c->dtype, kv * c->E), .q_bias = numbers(c->dtype, c->E),
        .k_bias = numbers(c->dtype, kv), .v_bias = numbers(c->dtype, kv),
        .out_weight = numbers(c->dtype, c->E * c->E), .out_bias = numbers(c->dtype, c->E),
    };
    mha_weights *weights = NULL;
    if (mha_weights_create(&widths, c->dtype, &parameters, &weights) != MHA_OK)
        abort();
    return weights;
}

/* Nothing is released: the process ends. */
static mha_status make_call(const counted_call *c)
{
    const ptrdiff_t item = c->dtype == MHA_FLOAT32 ? (ptrdiff_t)sizeof(float) : (ptrdiff_t)sizeof(double);
    const ptrdiff_t row = (ptrdiff_t)c->E * item;
    const mha_array query = {numbers(c->dtype, c->N * c->L * c->E), (ptrdiff_t)c->L * row, row, item};
    const mha_array key = c->L == c->S ? query
                                       : (mha_array){numbers(c->dtype, c->N * c->S * c->E), (ptrdiff_t)c->S * row,
                                                     row, item};
    const mha_call call = {
        .N = c->N, .L = c->L, .S = c->S, .query = query, .key = key, .value = key,
        .attn_mask = attention_mask(c), .key_padding_mask = padding_mask(c), .is_causal = c->is_causal,
        .dropout_p = c->dropout_p, .output = allocate(c->N * c->L * c->E * (size_t)item),
        .output_batch_first = true, .weights_wanted = c->wanted,
        .attn_weights = allocate(c->N * c->L * c->S * (size_t)item), .threads = 1,
    };
    return mha_forward(make_weights(c), &call);
}

int main(int count, char **words)
{
    const char *reason = NULL;
    if (!mha_cpu_init(&reason)) {
        fprintf(stderr, "%s\n", reason);
        return 1;
    }
    for (size_t i = 0; i < CALLS; i++) {
        if (count < 2)
            puts(calls[i].name);
        else if (strcmp(calls[i].name, words[1]) == 0)
            return make_call(&calls[i]) == MHA_OK ? 0 : 1;
    }
    return count < 2 ? 0 : 1;
}
