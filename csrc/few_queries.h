/* SPDX-License-Identifier: Apache-2.0
 *
 * few_queries.h - attention without projecting keys and values, for items that have far more keys than queries.
 *
 *      score of query l, key s, head h   =  q_h (Wk_h x_s + bk_h)   =  (Wk_h^T q_h) x_s  + a constant of the row
 *      context of query l, head h        =  sum_s p_s (Wv_h x_s + bv_h)  =  Wv_h (sum_s p_s x_s)  + bv_h
 *
 * Softmax does not depend on the constant. So the inputs of the keys serve as keys and values, and they are the same
 * for every head. All heads of all queries of an item are lanes side by side: lane i is query i / H, head i % H.
 *
 * The equations hold for finite numbers only. An infinite x_s makes the score infinite, but projecting the key gives
 * infinities of both signs, whose sum is NaN. So an item is given up when a number that is not finite is found.
 */
#ifndef MHA_FEW_QUERIES_H
#define MHA_FEW_QUERIES_H

#include "layer.h"
#include "masks.h"
#include "threads.h"

typedef struct {
    const mha_layer *layer;
    const mha_call *call;
    const mha_live_keys *live;
    const mha_rules *rules;
    const char *q; /* projected queries: row n * L + l; strides are in numbers */
    size_t q_stride, q_head;
    char *context; /* rows in the same order; the stride is in numbers */
    size_t context_stride;
    char *workspace; /* the offsets below lead into it; NULL while it is planned */

    size_t items;        /* items that are computed this way */
    size_t segments;     /* the most segments of keys of any of them */
    size_t item_numbers; /* [items]: their numbers */
    size_t t, t_stride;  /* [items][L * H]: rows Wk_h^T q_h */
    size_t t_panels;     /* [items]: the same rows as panels [Ek][P] */
    size_t query_panels; /* [items][L]: the same rows as panels of the heads of one query, for the probabilities */
    size_t sums;         /* [items][segments]: panels [Ev][P] of sums of p_s x_s */
    /* [items][segments][lanes]: softmax's results for a segment; those of segment 0 become those of all */
    size_t maximum, sum;
    size_t y, y_stride; /* [items][L * H]: rows sum_s p_s x_s, normalised */
    size_t bias_factor; /* [items][lanes]: what bv is multiplied by: 1, or 0 if the query sees no key */
    size_t is_given_up; /* [N]: a number that is not finite was found */
} mha_few_queries;

/* Whether the items of a call can be computed this way. */
bool mha_few_queries_can(const mha_layer *layer, const mha_call *call);

/* Whether it pays for an item with so many live keys. It depends on nothing else, so that the bits of an item do not
 * depend on the other items of its batch. */
bool mha_few_queries_pays(const mha_layer *layer, const mha_call *call, size_t live_keys);

/* Plans the workspace. `layer`, `call`, `live` and `rules` must be set. If no item is computed this way, f->items
 * becomes 0. */
void mha_few_queries_plan(mha_few_queries *f, mha_layout *layout);
size_t mha_few_queries_scratch(const mha_few_queries *f); /* bytes for each thread */

/* Fills the context of these items, and their probabilities if they are wanted. *given_up counts the items that were
 * given up. They are then no longer marked in live->is_few, and the call must be planned again. In that case only the
 * context has been written. */
mha_status mha_few_queries_attend(const mha_few_queries *f, const mha_team *team, size_t *given_up);

#endif
