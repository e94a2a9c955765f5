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
 * Of products of bfloat16, those with Wv are narrow. Wk is read the other way round, for which it is not packed, and
 * attention reads inputs instead of keys, so both multiply float32, which is more exact.
 *
 * The equations hold for finite numbers only. An infinite x_s makes the score infinite, but projecting the key gives
 * infinities of both signs, whose sum is NaN. So a query is given up when it meets a number that is not finite. Its
 * item goes through another pass. Only queries that were given up take their results from it. The others keep theirs.
 */
#ifndef MHA_FEW_QUERIES_H
#define MHA_FEW_QUERIES_H

#include <stdatomic.h>

#include "attention.h"
#include "layer.h"
#include "saved.h"

typedef struct {
    const mha_attention *a; /* what attention.c would do with projected keys */
    const mha_layer *layer;
    const mha_rows *key, *value; /* inputs; row s of an item is key s */

    size_t segments;    /* the most segments of keys of any item */
    mha_split split;    /* of the lanes of an item */
    mha_split by_head;  /* of the heads of one query */
    char *t;            /* [item][L * H]: rows Wk_h^T q_h */
    char *t_panels;     /* [item]: the same rows as panels [Ek][P] */
    char *query_panels; /* [item][L]: the same rows as panels of the heads of one query, for the probabilities */
    char *sums;         /* [item][segments]: panels [Ev][P] of sums of p_s x_s */
    /* [item][segments][lanes]: softmax's results for a segment; those of segment 0 become those of all */
    char *maximum, *sum;
    char *y;           /* [item][L * H]: rows sum_s p_s x_s, normalised */
    char *bias_factor; /* [item][lanes]: what bv is multiplied by: 1, or 0 if the query sees no key */
    atomic_bool *is_given_up; /* [item][L]: the query met a number that is not finite */
    size_t t_stride, y_stride; /* numbers between rows of t, and of y */
} mha_few_queries;

/* Picks the items that are computed this way: those for which it pays, or those that the call names. Whether it pays
 * depends on the item alone, so that its bits do not depend on the other items of its batch. */
void mha_pick_few_queries(const mha_layer *layer, const mha_call *call, mha_items *items);

/* Plans the computation of what `a` describes, except for its scratch. Returns the bytes of scratch that each thread
 * needs. */
size_t mha_plan_few_queries(mha_few_queries *f, const mha_attention *a, const mha_layer *layer, const mha_rows *key,
                            const mha_rows *value, mha_plan *plan);

/* Fills the context of the items, and their probabilities if they are wanted. */
mha_status mha_attend_few_queries(const mha_few_queries *f);

/* Call this when the results are written. Every item with a query that was given up is no longer picked. The results
 * of the item's other queries are saved. */
mha_status mha_give_up_items(const mha_few_queries *f, const mha_call *call, mha_items *items, mha_saved *saved);

#endif
