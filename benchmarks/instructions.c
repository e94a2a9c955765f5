/* SPDX-License-Identifier: Apache-2.0
 *
 * instructions.c - one forward pass of a kind, for instructions.py to count its instructions.
 *
 * Without an argument it prints the names of the calls, with one it makes that call, on one thread.
 */
#include <stdio.h>
#include <string.h>

#include "calls.h"
#include "cpu.h"

/* Large enough that the kernels dominate where they should, small enough for a second under valgrind. */
static const struct {
    const char *name;
    described_call call;
} calls[] = {
    {"tiny", {3, 5, 5, 8, 8, 8, 4, 4, .dtype = MHA_FLOAT32}},
    {"tiny with weights", {1, 16, 16, 64, 64, 64, 4, 4, .wanted = MHA_WANT_AVERAGES}},
    {"short, 32 to a head", {1, 32, 32, 384, 384, 384, 12, 12, .dtype = MHA_FLOAT32}},
    {"encoder, 64 to a head", {1, 128, 128, 384, 384, 384, 6, 6, .dtype = MHA_FLOAT32}},
    {"ragged, 24 to a head", {3, 77, 77, 120, 120, 120, 5, 5, .dtype = MHA_FLOAT32}},
    {"one wide head", {1, 64, 64, 256, 256, 256, 1, 1, .dtype = MHA_FLOAT32}},
    {"causal", {1, 256, 256, 128, 128, 128, 2, 2, .is_causal = true}},
    {"padded", {4, 128, 128, 128, 128, 128, 2, 2, .live = {128, 64, 128, 64}}},
    {"float mask", {1, 128, 128, 128, 128, 128, 2, 2, .attn = MHA_MASK_FLOAT32}},
    {"boolean mask", {1, 128, 128, 128, 128, 128, 2, 2, .attn = MHA_MASK_HIDE}},
    {"one token", {1, 1, 1, 256, 256, 256, 4, 4, .dtype = MHA_FLOAT32}},
    {"one token in bfloat16", {1, 1, 1, 256, 256, 256, 4, 4, .dtype = MHA_BFLOAT16, .is_bf16 = true}},
    {"one token, products of int8", {1, 1, 1, 256, 256, 256, 4, 4, .is_int8 = true}},
    {"few queries", {1, 1, 512, 256, 256, 256, 4, 4, .dtype = MHA_FLOAT32}},
    {"averaged weights", {2, 64, 64, 128, 128, 128, 2, 2, .wanted = MHA_WANT_AVERAGES}},
    {"grouped heads", {1, 128, 128, 256, 256, 256, 4, 1, .dtype = MHA_FLOAT32}},
    {"dropout", {1, 64, 64, 128, 128, 128, 2, 2, .dropout_p = 0.1}},
    {"float64", {1, 96, 96, 128, 128, 128, 2, 2, .dtype = MHA_FLOAT64}},
    {"layer", {1, 64, 64, 128, 128, 128, 4, 4, .F = 512}},
    {"bfloat16, products of float32", {1, 96, 96, 128, 128, 128, 2, 2, .dtype = MHA_BFLOAT16}},
    {"few queries in bfloat16", {1, 1, 512, 256, 256, 256, 4, 4, .dtype = MHA_BFLOAT16, .is_bf16 = true}},
    {"few queries in float16", {1, 1, 512, 256, 256, 256, 4, 4, .dtype = MHA_FLOAT16}},
    {"products of bfloat16", {1, 96, 96, 128, 128, 128, 2, 2, .is_bf16 = true}},
    {"bfloat16 and a float mask", {1, 128, 128, 128, 128, 128, 2, 2, .attn = MHA_MASK_FLOAT32, .is_bf16 = true}},
    {"products of int8", {1, 96, 96, 128, 128, 128, 2, 2, .is_int8 = true}},
    {"padded layer", {4, 64, 64, 128, 128, 128, 4, 4, .live = {64, 16, 32, 48}, .F = 512}},
};
enum { CALLS = sizeof calls / sizeof *calls };

static mha_status make_call(const described_call *described)
{
    const prepared_call prepared = prepare_call(described);
    return mha_forward(prepared.layer, &prepared.call);
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
            return make_call(&calls[i].call) == MHA_OK ? 0 : 1;
    }
    return count < 2 ? 0 : 1;
}
