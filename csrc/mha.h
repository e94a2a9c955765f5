/* SPDX-License-Identifier: Apache-2.0
 *
 * mha.h - the core's whole interface: what attention is told, and what it answers.
 *
 * Owns: the types that cross from the Python binding to the core, and three verbs: pack the weights once,
 * estimate a call, run a call. A call is that of a whole layer, or attention alone. The core knows nothing of Python,
 * and never modifies what it is given.
 *
 * The letters, used in every file (torch's own; ARCHITECTURE.md explains them):
 *   N batch items   L queries of an item   S keys of an item   H heads   Hkv key/value heads
 *   D width of a query or key head   Dv width of a value head
 *   E, Ek, Ev features of the query, key and value inputs   Eo features of the output
 * A pointer carries its subscripts, outermost first: q_nlh is indexed by (n, l, h).
 */
#ifndef MHA_H
#define MHA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
    MHA_OK = 0,
    MHA_NO_MEMORY, /* an allocation failed */
    MHA_TOO_LARGE, /* a size in bytes does not fit size_t */
    MHA_STOPPED,   /* should_stop() answered true; the output is undefined */
} mha_status;

typedef enum { MHA_FLOAT32 = 0, MHA_FLOAT64 = 1 } mha_dtype;

/* Every width of the layer. Query head h reads key/value head h / (H / Hkv). */
typedef struct {
    size_t H, Hkv;    /* Hkv divides H */
    size_t D, Dv;     /* may differ; H * D need not be E */
    size_t E, Ek, Ev; /* input features */
    size_t Eo;        /* output features */
} mha_widths;

/* The parameters as torch stores them: C-contiguous, in the layer's dtype, rows are output features. A bias is NULL
 * where the layer has none. */
typedef struct {
    const void *q_weight, *k_weight, *v_weight; /* (H*D, E), (Hkv*D, Ek), (Hkv*Dv, Ev) */
    const void *q_bias, *k_bias, *v_bias;       /* (H*D), (Hkv*D), (Hkv*Dv) */
    const void *bias_k, *bias_v;                /* (Hkv*D), (Hkv*Dv): one more key and value, never projected */
    const void *out_weight, *out_bias;          /* (Eo, H*Dv), (Eo) */
} mha_parameters;

/* Parameters packed for the kernels of this CPU: immutable, usable from any number of threads. k_weight must stay
 * where it is, unchanged, as long as they live; nothing else of the mha_parameters is referenced afterwards. */
typedef struct mha_weights mha_weights;

mha_status mha_weights_create(const mha_widths *widths, mha_dtype dtype, const mha_parameters *parameters,
                              mha_weights **weights);
void mha_weights_destroy(mha_weights *weights); /* NULL is allowed */

/* An input of shape (N, length, features), native byte order, of the layer's dtype. Strides are in bytes and may be
 * anything: negative, zero, no multiple of the item size. */
typedef struct {
    const void *data;
    ptrdiff_t stride_n, stride_l, stride_e;
} mha_array;

/* Keys or values that need no projection, of shape (N, Hkv, S, features); data NULL: none. Strides as in mha_array. */
typedef struct {
    const void *data;
    ptrdiff_t stride_n, stride_h, stride_s, stride_d;
} mha_projected;

typedef enum {
    MHA_MASK_NONE = 0,
    MHA_MASK_HIDE, /* one byte per element, non-zero = this key is hidden: torch.nn.MultiheadAttention's bool masks */
    MHA_MASK_SHOW, /* the same the other way round: scaled_dot_product_attention's */
    MHA_MASK_FLOAT32, /* added to the score, whatever the layer's dtype */
    MHA_MASK_FLOAT64,
} mha_mask_kind;

/* A mask of shape (N, H, L, S), strides in bytes; a stride of 0 broadcasts. */
typedef struct {
    const void *data;
    mha_mask_kind kind;
    ptrdiff_t stride_n, stride_h, stride_l, stride_s;
} mha_mask;

typedef enum {
    MHA_WEIGHTS_NONE = 0,
    MHA_WEIGHTS_AVERAGED,
    MHA_WEIGHTS_PER_HEAD,
    MHA_SCORES_PER_HEAD, /* in their place the scores that they come from, after the masks; no context, no output */
} mha_weights_wanted;

/* What a query gets that may see no key at all: attention 0, or NaN (torch's own answer with need_weights=True). */
typedef enum { MHA_EMPTY_ROW_ZERO = 0, MHA_EMPTY_ROW_NAN } mha_empty_row;

/* Asked now and then by the calling thread alone, between its own tasks. NULL function: never. */
typedef struct {
    bool (*should_stop)(void *context);
    void *context;
    bool with_task; /* the call is made by a task of another: it runs in that one's thread, and stops with it */
} mha_stop;

typedef struct {
    size_t N, L, S;
    mha_array query, key, value; /* equal data and strides mean "the same input", projected in one pass */
    mha_projected static_k, static_v; /* taken in place of what key and value would become */
    mha_mask attn_mask;
    mha_mask key_padding_mask; /* only stride_n and stride_s count */
    bool is_causal;            /* query l sees keys 0..l, on top of the masks */
    bool add_zero_attn;        /* one more key and value, all zero, that every query sees */
    mha_empty_row empty_row;
    double dropout_p;          /* in [0, 1]; 0 = none */
    uint64_t dropout_seed, dropout_call;

    const bool *is_few; /* [N]: items to treat without projecting their keys, where that is possible at all; NULL: those
                           for which it pays (mha_choose_paths) */

    void *output; /* (N, L, Eo): features adjacent, and either (N, L) or (L, N) order without gaps; NULL: not wanted */
    bool output_batch_first;
    bool output_is_apart; /* from the inputs and masks; else it is written last, when nothing else is read any more */
    mha_weights_wanted weights_wanted;
    void *attn_weights; /* C-contiguous (N, L, S') or (N, H, L, S'); S' = S + mha_extra_keys() */
    void *context; /* C-contiguous (N, L, H * Dv): what the output is projected from; NULL: not wanted */

    size_t threads; /* at least 1 */
    mha_stop stop;
} mha_call;

/* Keys that bias_k and add_zero_attn append to every item: 0, 1 or 2. */
size_t mha_extra_keys(const mha_weights *weights, const mha_call *call);

/* Floating-point operations of a call, roughly, for decisions that need no exactness; saturates. */
double mha_forward_operations(const mha_weights *weights, const mha_call *call);

mha_status mha_forward(const mha_weights *weights, const mha_call *call);

/* Fills is_few [N]: whether forward treats an item without projecting its keys (few_queries.h). */
mha_status mha_choose_paths(const mha_weights *weights, const mha_call *call, bool *is_few);

typedef enum { MHA_QUERY = 0, MHA_KEY, MHA_VALUE } mha_input;

/* One of forward's first steps alone: x (N, length, features) projected to y, C-contiguous (N, length, width). The width
 * is H * D for a query, Hkv * D for a key and Hkv * Dv for a value. */
typedef struct {
    const mha_weights *weights;
    mha_input input;
    size_t N, length;
    mha_array x;
    void *y;
    size_t threads;
    mha_stop stop;
} mha_input_projection;

mha_status mha_project_input(const mha_input_projection *input);

/* ---- Attention alone: softmax(scale q k^T + mask) v, torch's scaled_dot_product_attention ---- */

/* Rows of some heads, of items that a number of axes lead to. The features of a row are adjacent and aligned; strides
 * are in bytes, multiples of the size of a number, and 0 where one stands for all. */
typedef struct {
    const void *data;
    size_t heads;                 /* query head h reads head h / (H / heads); divides the query's own, H */
    const ptrdiff_t *stride_axes; /* [axes] */
    ptrdiff_t stride_h, stride_l;
} mha_heads;

typedef struct {
    mha_dtype dtype;
    size_t axes;
    const size_t *length; /* [axes] */
    size_t L, S, D, Dv;
    mha_heads query, key, value; /* rows of the query ascend: stride_l is not negative */
    mha_mask mask;               /* its stride_n does not count, */
    const ptrdiff_t *mask_axes;  /* [axes]: these strides do */
    bool is_causal;              /* query l sees keys 0..l, on top of the mask */
    double scale;
    double dropout_p; /* in [0, 1]; 0 = none */
    uint64_t dropout_seed;

    void *output; /* C-contiguous (axes, H, L, Dv); a query that may see no key gets 0 */
    size_t threads; /* at least 1 */
    mha_stop stop;
} mha_sdpa_call;

double mha_sdpa_operations(const mha_sdpa_call *call);

mha_status mha_sdpa(const mha_sdpa_call *call);

#endif
