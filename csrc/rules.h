/* SPDX-License-Identifier: Apache-2.0
 *
 * rules.h - what happens to a score between q k^T and the values: scale, masks, the causal order, dropout.
 *
 * No mask applies to extra keys.
 */
#ifndef MHA_RULES_H
#define MHA_RULES_H

#include "batch.h"

typedef struct {
    double scale; /* of q k^T */
    mha_mask attn;
    const ptrdiff_t *attn_items; /* by an item's index, bytes from attn.data to its mask; NULL: n * stride_n */
    mha_mask padding; /* kind NONE if no live key has a number other than 0 */
    bool is_causal;
    mha_empty_row empty_row;
    double dropout_p; /* 0: no dropout */
    uint32_t dropout_key[2];
} mha_rules;

/* The rules of a call. */
mha_rules mha_rules_of(const mha_call *call, double scale, bool padding_adds);

/* The lanes of a panel. Lane i of an item is query i / heads of head first_head + i % heads. */
typedef struct {
    size_t first_head, heads;
    size_t first, count; /* the lanes of this panel */
    size_t vectors;
} mha_lanes;

/* What the lanes see of a block of item n. If the result is_biased, add bias [keys][P] to the scores of the visible
 * keys. Otherwise add nothing; the contents of bias are then undefined. */
mha_visible mha_apply_rules(const mha_kernels *kernels, const mha_rules *rules, size_t n, const mha_lanes *lanes,
                            const mha_key_block *block, void *bias);

#endif
