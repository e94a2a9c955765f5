/* SPDX-License-Identifier: Apache-2.0
 *
 * few_queries.h - attention without projecting the keys and values, for items that have far more keys than queries.
 *
 *      score of query l, key s, head h   =  q_h (Wk_h x_s + bk_h)   =  (Wk_h^T q_h) x_s  + a constant of the row
 *      context of query l, head h        =  sum_s p_s (Wv_h x_s + bv_h)  =  Wv_h (sum_s p_s x_s)  + bv_h
 *
 * The constant leaves softmax as it is. So the keys' inputs are their own keys and values, the same for every head,
 * and all heads of all queries of an item are lanes beside each other: lane i is query i / H, head i % H.
 *
 * These equations hold for finite numbers: an infinite x_s makes the score infinite where projecting the key gives
 * infinities of both signs, whose sum is NaN. So an item that meets a number that is not finite is given up.
 */
#ifndef MHA_FEW_QUERIES_H
#define MHA_FEW_QUERIES_H

#include "masks.h"
#include "weights.h"

typedef struct {
    const mha_weights *weights;
    const mha_call *call;
    const mha_live_keys *live;
    const mha_masks *masks;
    const char *q; /* projected queries, row n * L + l, */
    size_t q_stride, q_head;
    char *context; /* and what becomes of them; strides in numbers */
    size_t context_stride;
    char *block; /* the workspace in which everything below lies; NULL while it is planned */

    size_t items;  /* that are treated this way, */
    size_t chunks; /* the most that the keys of any of them fill */
    size_t item;   /* offsets: [items] their numbers */
    size_t t, t_stride;       /* [items][L * H]: rows Wk_h^T q_h */
    size_t t_panels;          /* [items]: the same as panels [Ek][P], */
    size_t query_panels;      /* [items][L]: and, for the weights, as panels of one query's heads */
    size_t sums;              /* [items][chunks]: panels [Ev][P] of sums of p_s x_s, */
    size_t maximum, sum;      /* [items][chunks][lanes]: what softmax knows of a chunk; the first takes in the others */
    size_t y, y_stride;       /* [items][L * H]: rows sum_s p_s x_s, normalised */
    size_t mass;              /* [items][lanes]: what bv is multiplied with */
    size_t is_given_up;       /* [N] */
} mha_few_queries;

/* Whether the items of a call can be treated this way, and whether one with so many live keys is better treated so. It
 * depends on nothing else, so that the bits of an item do not depend on the others of its batch. */
bool mha_few_queries_can(const mha_weights *weights, const mha_call *call);
bool mha_few_queries_pays(const mha_weights *weights, const mha_call *call, size_t live_keys);

/* Plans the workspace for call, live keys and weights, which must be set; f->items is 0 where nothing is to be done. */
void mha_few_queries_plan(mha_few_queries *f, mha_layout *layout);
size_t mha_few_queries_scratch(const mha_few_queries *f); /* bytes a thread */

/* Fills the context, and the attention weights where they are wanted, of those items. Where some have to be given up,
 * they are not few any more: the call has to be planned anew, and nothing is written but the context. */
mha_status mha_few_queries_attend(const mha_few_queries *f, char *scratch, size_t scratch_bytes, size_t *given_up);

#endif
