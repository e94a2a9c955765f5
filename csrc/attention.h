/* SPDX-License-Identifier: Apache-2.0
 *
 * attention.h - softmax(rules(q k^T)) v for every head, and the probabilities if they are wanted.
 */
#ifndef MHA_ATTENTION_H
#define MHA_ATTENTION_H

#include <stdatomic.h>

#include "panels.h"
#include "rules.h"
#include "threads.h"
#include "workspace.h"

/* Offsets into a thread's scratch, in bytes. There is a state for each panel of a task. */
typedef struct {
    size_t scores, bias; /* [block][P] */
    size_t values;       /* [block][Dv]; only if masks or the order may hide keys */
    size_t rows;         /* [P][block] */
    size_t states, queries, out, maximum, sum, factor, kept, probabilities, state_bytes;
} mha_attention_scratch;

typedef struct {
    const mha_kernels *kernels;
    const mha_batch *batch;
    const mha_rules *rules;
    size_t L, H, Hkv, D, Dv;
    mha_rows q, context;
    mha_rows k, v;             /* row l of an item is that of its live key l */
    mha_rows extra_k, extra_v; /* of the extra keys; the same for every item */
    mha_wanted wanted;
    mha_rows probabilities; /* of a query: S + extra adjacent numbers. Averages have one head. */
    const mha_team *team;

    /* Set by mha_plan_attention(). */
    mha_split split; /* of the L queries of a head */
    /* [item][H][lanes of all panels of L]: results of the first pass that the second one needs. Only if probabilities
     * are wanted. */
    char *maximum, *sum;
    mha_attention_scratch at;
    size_t heads;       /* heads of a bundle: tasks share out their panels */
    size_t bundles;     /* bundles of all items */
    size_t task_panels; /* panels of a task in the first pass */
    size_t groups;      /* tasks of a bundle, or of the heads whose probabilities are averaged */
    size_t segments;    /* tasks of a panel in the second pass */
    size_t kept_panels; /* panels of a task that keeps its scores until probabilities are made from them; 0: none does */

    atomic_bool is_careful; /* a panel was led over the keys with care, as the second pass must be */
} mha_attention;

/* Completes the plan of an attention whose other members are set, except for addresses and the team's scratch. Returns
 * the bytes of scratch that each thread needs. */
size_t mha_plan_attention(mha_attention *a, mha_plan *plan);

/* Fills the context, and the probabilities if they are wanted. */
mha_status mha_attend(mha_attention *attention);

/* Runs a product of values (rows: features, depth: keys) and exps in which hidden values may be NaN or infinite. The
 * product reads `finite` [keys][features], a copy of the values with 0 for such numbers. Then they are added, each to the
 * lanes that see its key: those whose bias [keys][P] is not -inf; NULL: all. The order of these additions does not matter,
 * because the sums become infinite or NaN. */
void mha_add_values_with_care(const mha_kernels *kernels, const mha_product *values, const char *bias, char *finite);

#endif
