/* SPDX-License-Identifier: Apache-2.0
 *
 * attention.h - softmax(rules(q k^T)) v for every head, in one pass over the keys.
 */
#ifndef MHA_ATTENTION_H
#define MHA_ATTENTION_H

#include <stdatomic.h>

#include "panels.h"
#include "rules.h"
#include "threads.h"
#include "workspace.h"

/* How the panels of all heads and items are divided into tasks. */
typedef struct {
    size_t heads;   /* heads of a bundle: tasks share out their panels */
    size_t bundles; /* bundles of all items */
    size_t panels;  /* panels of a task */
    size_t tasks_per_bundle;

    /* For probabilities.c: */
    size_t kept_panels; /* panels of a task that keeps its scores until probabilities are made from them; 0: none */
    size_t kept_tasks;  /* such tasks of the heads whose probabilities are averaged */
    size_t segments;    /* tasks of a panel in the second pass */
} mha_attention_tasks;

/* Offsets into a thread's scratch, in bytes. */
typedef struct {
    size_t scores, bias;                       /* [block][P] */
    size_t finite;                             /* [block][Dv]; only if the rules can hide keys */
    size_t keys, values;                       /* copies of a block of some heads; only if blocks are copied */
    size_t wide;                               /* widened rows; only if the inputs are halves */
    size_t narrow_exps;                        /* of a block; only if products are narrow */
    size_t rounded;                            /* [block][Dv]; only if products are narrow, and rules can hide keys */
    size_t states, state_bytes;                /* a state for each panel of a task */
    size_t queries, out, maximum, sum, factor; /* offsets into such a state */
    size_t kept, kept_bytes;                   /* [panel][2][keys of all blocks][P]: probabilities, and scores */
    size_t probabilities;                      /* [keys of some blocks][P], in the second pass */
    size_t rows;                               /* [P][block]: transposed probabilities */
    mha_layout layout;                         /* of all of them */
} mha_attention_scratch;

typedef struct {
    const mha_kernels *kernels;
    const mha_narrow_kernels *narrow; /* of products of bfloat16; NULL: they are not narrow */
    const mha_batch *batch;
    const mha_rules *rules;
    size_t L, H, Hkv, D, Dv;
    bool is_live_only; /* queries are the live keys' tokens: an item has as many rows of q and context as live keys */
    mha_rows q, context;       /* q, context, k and v may be halves, all of one type */
    mha_rows k, v;             /* row l of an item is that of its live key l */
    mha_rows extra_k, extra_v; /* of the extra keys; the same for every item */
    mha_wanted wanted;
    mha_rows probabilities; /* of a query: S + extra adjacent numbers. Averages have one head. */
    const mha_team *team;

    /* Set by mha_plan_attention() or mha_plan_probabilities(). */
    size_t heads_per_kv; /* query heads of a key/value head */
    double query_scale, score_factor; /* the scale is their product */
    mha_split split;     /* of the L queries of a head */
    mha_attention_tasks tasks;
    mha_attention_scratch at;
    /* [item][H][lanes of all panels of L]: results of softmax from which probabilities are made, if they are wanted */
    char *maximum, *sum;
    atomic_bool is_careful; /* numbers that are not finite were found; see "Hidden numbers" in attention.c */
} mha_attention;

/* Completes the plan of an attention without probabilities. The members before are set, except for addresses and the
 * team's scratch. Returns the bytes of scratch that each thread needs. */
size_t mha_plan_attention(mha_attention *a);

/* Fills the context. */
mha_status mha_attend(mha_attention *attention);

/* A product of values (rows: features, depth: keys) and exps in which hidden values may be NaN or infinite is run in
 * two steps. The first one, which is returned, reads `finite` [keys][features], a copy of the values with 0 for such
 * numbers. The second one adds these, each to the lanes that see its key: those whose bias [keys][P] is not -inf; NULL:
 * all. The order of these additions does not matter, because the sums become infinite or NaN. */
mha_product mha_with_finite_values(const mha_kernels *kernels, const mha_product *values, char *finite);
void mha_add_other_values(const mha_kernels *kernels, const mha_product *values, const char *bias);

/* ---- What probabilities.c shares ---- */

enum { MHA_MAX_TASK_PANELS = 4 }; /* panels that read keys and values, or the mask, together */

/* What a task holds for one panel. */
typedef struct {
    char *base;                   /* the thread's scratch */
    char *bias;                   /* [block][P]: what masks add to the scores */
    char *queries;                /* [D][P], scaled */
    char *out;                    /* [Dv][P]; undefined until a block has a visible key */
    char *maximum, *sum, *factor; /* [P] */
    size_t item, h, hkv;          /* h: query head. hkv: its key/value head. */
    /* sharers: panels of this task with the same hkv. share: the index of this panel among them. */
    size_t share, sharers;
    mha_panel panel;
    bool is_empty; /* no key was visible so far */
    char *finite;  /* [block][Dv]: for multiply_values_with_care(); NULL: without care */
    char *keys, *values; /* copies of a block; NULL: it is not copied. Panels of a head share them. */
    char *kept;    /* [keys of all blocks][P]: the scores, if probabilities are made from them; otherwise NULL */
} mha_panel_state;

/* Lanes of the widest panel of L queries. */
static inline size_t mha_widest_panel(const mha_attention *a)
{
    return a->kernels->lanes * mha_smaller(a->split.vectors, a->kernels->vectors);
}

/* The number of queries of an item. Here and below, `item` is its place in the batch. */
static inline size_t mha_queries_of(const mha_attention *a, size_t item)
{
    return a->is_live_only ? mha_live_keys(a->batch, item) : a->L;
}

/* Keys of the largest possible block. S is an upper bound of the live keys of an item. */
static inline size_t mha_max_block_keys(const mha_attention *a)
{
    return mha_smaller(MHA_BLOCK_KEYS, mha_larger(a->batch->S, a->batch->extra));
}

static inline size_t mha_max_blocks(const mha_attention *a)
{
    return mha_divide_up(a->batch->S, MHA_BLOCK_KEYS) + (a->batch->extra > 0);
}

/* Bytes of the scores of a block. */
static inline size_t mha_block_bytes(const mha_attention *a, size_t vectors)
{
    return mha_max_block_keys(a) * vectors * a->kernels->lanes * a->kernels->size;
}

/* Where maximum and sum of a panel are. */
static inline size_t mha_statistics_offset(const mha_attention *a, const mha_panel_state *s)
{
    return ((s->item * a->H + s->h) * a->split.vectors * a->kernels->lanes + s->panel.first) * a->kernels->size;
}

/* An item without any key gives 0, as in torch. NaN is for keys that are all hidden. */
static inline mha_empty_row mha_empty_row_of(const mha_attention *a)
{
    return a->batch->S + a->batch->extra > 0 ? a->rules->empty_row : MHA_EMPTY_ROW_ZERO;
}

/* Plans the scratch of a thread whose tasks have up to `panels` panels. */
void mha_plan_panels(mha_attention *a, size_t panels);

/* Sets up panel i of a task. */
void mha_set_up_panel(const mha_attention *a, size_t worker, size_t i, size_t item, size_t h, mha_panel panel,
                      mha_panel_state *s);

/* Leads some panels of an item, at least one, together over the keys of their heads, and writes their context. Returns
 * false if the call is to be stopped. */
bool mha_attend_panels(mha_attention *a, mha_panel_state *panels, size_t count);

/* Packs the queries of a panel, scaled; narrow if products are. */
void mha_pack_queries(const mha_attention *a, const mha_panel_state *s);

/* scores [block][P] of a panel whose queries are packed. Keys that are not visible get -inf. */
void mha_score_block(const mha_attention *a, const mha_panel_state *s, const mha_key_block *block, char *scores);

/* Applies dropout to the probabilities of the first `keys` keys of a block. */
void mha_drop_out(const mha_attention *a, const mha_panel_state *s, const mha_key_block *block, size_t keys,
                  char *probabilities);

#endif
