/* SPDX-License-Identifier: Apache-2.0
 *
 * attention.h - softmax(q k^T / sqrt(D) + masks) v for every head, and the probabilities if they are wanted.
 */
#ifndef MHA_ATTENTION_H
#define MHA_ATTENTION_H

#include "masks.h"
#include "panels.h"
#include "threads.h"

/* Rows of all heads. Strides are in numbers. Row l of head h of item n is at
 *
 *      data + n * stride_n + h * stride_h + l * stride_l
 *
 * If `items` is not NULL, items[n] replaces n * stride_n. */
typedef struct {
    char *data;
    ptrdiff_t stride_n, stride_h, stride_l;
    const ptrdiff_t *items; /* [N] */
} mha_rows;

typedef struct {
    const mha_kernels *kernels;
    size_t N, L, H, Hkv, D, Dv;
    mha_split split;   /* of the L queries of a head; set by mha_split_queries() */
    size_t first_item; /* the number of item 0 in the whole call; dropout depends on it */
    double scale;      /* of the scores */
    mha_rows q, context;
    mha_rows k, v;             /* row l is that of a live key (mha_key_block.first_row) */
    mha_rows extra_k, extra_v; /* the extra keys are the same for every item */
    const mha_live_keys *live;
    const mha_rules *rules;
    mha_empty_row empty_row;

    double dropout_p; /* 0: no dropout */
    uint32_t dropout_key[2];

    mha_wanted wanted;
    char *probabilities; /* C-contiguous (N, L, S') or (N, H, L, S') */
    /* [N][H][lanes of all panels of L]: results of the first pass that the second one needs. Only if probabilities are
     * wanted. */
    char *maximum, *sum;

    mha_team team;
} mha_attention;

/* Divides the queries of a head into panels. All other members except addresses must be set before. */
void mha_split_queries(mha_attention *a);

/* Bytes of scratch that each thread needs. */
size_t mha_attention_scratch(const mha_attention *a);

/* How many numbers `maximum` and `sum` have each. */
size_t mha_attention_statistics(const mha_attention *a);

/* Fills context, then probabilities, of all items except those of few_queries.c (live->is_few). */
mha_status mha_attend(const mha_attention *attention);

#endif
