/* SPDX-License-Identifier: Apache-2.0
 *
 * attention.h - softmax(q k^T / sqrt(D) + masks) v for every head, and the attention weights where they are asked for.
 */
#ifndef MHA_ATTENTION_H
#define MHA_ATTENTION_H

#include "masks.h"
#include "panels.h"

/* Rows of all heads; strides in numbers. Row l of head h of item n is at
 * data + n * stride_n + h * stride_h + l * stride_l, or at data + item[n] + ... where items lie out of step. */
typedef struct {
    char *data;
    ptrdiff_t stride_n, stride_h, stride_l;
    const ptrdiff_t *item; /* [N] */
} mha_rows;

typedef struct {
    const mha_kernels *kernels;
    size_t N, L, H, Hkv, D, Dv;
    mha_split split; /* of the L queries of a head, by mha_split_queries() */
    size_t first_item; /* number of item 0 in the whole call, for dropout */
    double scale; /* of the scores */
    mha_rows q, context;
    mha_rows k, v;             /* l is a live key's row (mha_key_block.row) */
    mha_rows extra_k, extra_v; /* the extra keys, the same for every item */
    const mha_live_keys *live;
    const mha_masks *masks;
    mha_empty_row empty_row;

    double dropout_p; /* 0: none */
    uint32_t dropout_key[2];

    mha_weights_wanted weights_wanted;
    char *attn_weights; /* C-contiguous (N, L, S') or (N, H, L, S') */
    /* [N][H][lanes of all panels of L], only where weights are wanted: what the first pass leaves for the second. */
    char *maximum, *sum;

    size_t threads;
    char *scratch; /* threads pieces of scratch_bytes */
    size_t scratch_bytes;
    mha_stop stop;
} mha_attention;

/* Cuts the queries of a head into panels, once all else that is no address is set. */
void mha_split_queries(mha_attention *a);

/* Bytes of scratch that each thread needs; numbers in maximum and in sum. */
size_t mha_attention_scratch(const mha_attention *a);
size_t mha_attention_statistics(const mha_attention *a);

/* Fills context, then attn_weights, of all items but those that live->is_few leaves to few_queries.c. */
mha_status mha_attend(const mha_attention *attention);

#endif
