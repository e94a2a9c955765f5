/* SPDX-License-Identifier: Apache-2.0
 *
 * mha.h - the interface of a call: what it says, and the functions that run one.
 *
 * Owns: the types that the Python binding hands to the core. Parameters are packed once. A call can be estimated and
 * run. It is a call of a whole layer, or attention alone. The core knows nothing of Python. It never modifies what it
 * is given.
 *
 * The letters are the same in every file (ARCHITECTURE.md explains them):
 *   N batch items   L queries of an item   S keys of an item   H heads   Hkv key/value heads
 *   D width of a query or key head   Dv width of a value head
 *   E, Ek, Ev features of the query, key and value inputs   Eo features of the output
 */
#ifndef MHA_H
#define MHA_H

#include "rows.h"

/* Every width of the layer. Query head h reads key/value head h / (H / Hkv). */
typedef struct {
    size_t H, Hkv;    /* Hkv divides H */
    size_t D, Dv;     /* may differ; H * D need not equal E */
    size_t E, Ek, Ev; /* input features */
    size_t Eo;        /* output features */
} mha_widths;

/* A weight matrix, C-contiguous, with a row for each output feature. */
typedef struct {
    const void *numbers; /* in the layer's dtype, or int8 */
    const float *scale;  /* [features]: weights are products of int8 and these; NULL: they are not int8 */
    bool is_bf16;        /* rows and weights are rounded to bfloat16 when they are multiplied; not with a scale */
} mha_weight;

/* The parameters as torch stores them: C-contiguous, in the layer's dtype. A bias that the layer does not have is NULL.
 * If the dtype is a half, inputs and results of calls are float32. Products of float64 are not narrow. */
typedef struct {
    mha_weight q_weight, k_weight, v_weight; /* (H*D, E), (Hkv*D, Ek), (Hkv*Dv, Ev) */
    const void *q_bias, *k_bias, *v_bias;    /* (H*D), (Hkv*D), (Hkv*Dv) */
    const void *bias_k, *bias_v; /* (Hkv*D), (Hkv*Dv): an additional key and value, which are not projected */
    mha_weight out_weight; /* (Eo, H*Dv) */
    const void *out_bias;  /* (Eo) */
    /* Scaled queries, keys, exponentials and values are rounded to bfloat16 when they are multiplied. */
    bool is_attention_bf16;
} mha_parameters;

/* Parameters packed for the kernels of this CPU. They are immutable, and any number of threads may use them. The array
 * k_weight.numbers has to stay where it is, unchanged, as long as they live, unless it is int8. Nothing else of
 * mha_parameters is referenced afterwards. */
typedef struct mha_layer mha_layer;

mha_status mha_layer_create(const mha_widths *widths, mha_dtype dtype, const mha_parameters *parameters,
                            mha_layer **layer);
void mha_layer_destroy(mha_layer *layer); /* NULL is allowed */

/* A linear map x W^T + b, packed like a layer. Nothing that it is made from is referenced afterwards. */
typedef struct mha_linear mha_linear;

/* weight (features, depth), bias (features); bias NULL: none */
mha_status mha_linear_create(mha_dtype dtype, size_t features, size_t depth, const mha_weight *weight, const void *bias,
                             mha_linear **linear);
void mha_linear_destroy(mha_linear *linear); /* NULL is allowed */

/* What a layer of a Transformer does besides attention. Rows x of the query become
 *
 *      y = attention_norm(x + attention(x))      output = feed_forward_norm(y + feed_forward(y))
 *      y = x + attention(attention_norm(x))      output = y + feed_forward(feed_forward_norm(y))     if norm_first
 *
 *      feed_forward(y) = activation(y W1^T + b1) W2^T + b2
 *
 * The first half of a gated linear1's features is activated, and multiplied by the second half. */
typedef struct {
    bool norm_first;
    bool is_self_attention; /* keys and values are the query's rows: they are normalized with it if norms come first */
    /* Of self-attention: rows that the padding hides as keys are 0. They are not computed where that is possible. */
    bool zeroes_padding;
    mha_norm attention_norm, feed_forward_norm; /* over E features */
    const mha_linear *linear1, *linear2; /* NULL: the output is y */
    mha_activation activation;
    bool is_gated;
} mha_block;

/* A mask of shape (N, H, L, S). Strides are in bytes. A stride of 0 broadcasts. */
typedef struct {
    const void *data;
    mha_mask_kind kind;
    ptrdiff_t stride_n, stride_h, stride_l, stride_s;
} mha_mask;

typedef enum {
    MHA_WANT_NONE = 0,
    MHA_WANT_AVERAGES,
    MHA_WANT_PROBABILITIES,
    MHA_WANT_SCORES, /* the scores after the masks instead of probabilities; then there is no context and no output */
} mha_wanted;

typedef struct {
    size_t N, L, S;
    /* (N, length, features), in native byte order. Neighbours with equal data and strides, of which the same
     * rows are needed, are read once. The members `items` are NULL. */
    mha_rows query, key, value;
    mha_rows static_k, static_v; /* (N, Hkv, S, features), in place of projected keys and values; data NULL: none */
    mha_mask attn_mask;
    mha_mask key_padding_mask; /* only stride_n and stride_s count */
    bool is_causal;            /* query l sees keys 0 to l only, in addition to the masks */
    bool add_zero_attn;        /* an additional key and value of zeros, which every query sees */
    mha_empty_row empty_row;
    double dropout_p; /* between 0 and 1; 0: no dropout */
    uint64_t dropout_seed, dropout_call;

    /* [N]: items that are computed without projecting their keys, where that is possible (few_queries.h). NULL: those
     * for which it pays, as mha_choose_paths() says. */
    const bool *is_few;

    /* (N, L, Eo), with adjacent features and ascending rows. It overlaps no input and no mask. data NULL: not
     * wanted. */
    mha_rows output;
    /* (N, L, H * Dv): the heads' results, from which the output is projected. data NULL: not wanted. */
    mha_rows context;
    mha_wanted wanted;
    void *attn_weights; /* C-contiguous (N, L, S') or (N, H, L, S'), where S' = S + mha_extra_keys() */

    /* NULL: attention alone. Otherwise the output is that of a layer, and nothing else is wanted. E is Eo. The features
     * of the query are adjacent and aligned. */
    const mha_block *block;

    size_t threads; /* at least 1 */
    mha_stop stop;
} mha_call;

/* The number of keys that bias_k and add_zero_attn append to every item: 0, 1 or 2. */
size_t mha_extra_keys(const mha_layer *layer, const mha_call *call);

/* About how many floating-point operations a call takes. It decides about threads, so it need not be exact. It cannot
 * overflow. */
double mha_forward_operations(const mha_layer *layer, const mha_call *call);

mha_status mha_forward(const mha_layer *layer, const mha_call *call);

/* Fills is_few [N]: whether forward computes an item without projecting its keys (few_queries.h). */
mha_status mha_choose_paths(const mha_layer *layer, const mha_call *call, bool *is_few);

typedef enum { MHA_QUERY = 0, MHA_KEY, MHA_VALUE } mha_input;

/* One input projection alone: x (N, length, features) is projected to y (N, length, width). The width is H * D for a
 * query, Hkv * D for a key and Hkv * Dv for a value. Rows of y are ascending, and their features adjacent. */
typedef struct {
    const mha_layer *layer;
    mha_input input;
    size_t N, length;
    mha_rows x, y;
    size_t threads;
    mha_stop stop;
} mha_input_projection;

mha_status mha_project_input(const mha_input_projection *input);

/* ---- Parts of a feed-forward network alone ---- */

typedef struct {
    const mha_linear *linear;
    size_t rows;
    const void *x; /* C-contiguous (rows, depth) */
    void *y;       /* C-contiguous (rows, features) */
    size_t threads;
    mha_stop stop;
} mha_linear_call;

double mha_linear_operations(const mha_linear_call *call);

mha_status mha_apply_linear(const mha_linear_call *call);

typedef struct {
    mha_dtype dtype;
    mha_activation activation;
    bool is_gated; /* the first half of a row is activated, and multiplied by the second half */
    size_t rows, width;
    const void *x; /* C-contiguous (rows, width), or (rows, 2 * width) if gated */
    void *y;       /* C-contiguous (rows, width) */
    size_t threads;
    mha_stop stop;
} mha_activation_call;

double mha_activation_operations(const mha_activation_call *call);

mha_status mha_apply_activation(const mha_activation_call *call);

/* ---- Attention alone: softmax(scale q k^T + mask) v, torch's scaled_dot_product_attention ---- */

/* An array (axes..., heads, rows, features) that is read in place. Features are adjacent and aligned. Distances are
 * multiples of the size of a number. A distance of 0 broadcasts. */
typedef struct {
    mha_rows rows;         /* rows.item is not used; axes stand for it */
    const ptrdiff_t *axes; /* [axes]: distances in bytes */
    size_t heads;          /* divides H, the heads of the query; query head h reads head h / (H / heads) */
} mha_heads;

typedef struct {
    mha_dtype dtype; /* float16 is multiplied as float32; bfloat16 as such, with exponentials rounded to it */
    size_t axes;
    const size_t *length; /* [axes] */
    size_t L, S, D, Dv;
    mha_heads query, key, value; /* rows of query and output ascend */
    mha_mask mask;               /* its stride_n is not used; mask_axes stands for it */
    const ptrdiff_t *mask_axes;  /* [axes]: the strides of the mask along the axes */
    bool is_causal; /* query l sees keys 0 to l only, in addition to the mask */
    double scale;
    double dropout_p; /* between 0 and 1; 0: no dropout */
    uint64_t dropout_seed;

    mha_heads output; /* H heads; rows of a query that sees no key are 0 */
    size_t threads; /* at least 1 */
    mha_stop stop;
} mha_sdpa_call;

double mha_sdpa_operations(const mha_sdpa_call *call);

mha_status mha_sdpa(const mha_sdpa_call *call);

#endif
