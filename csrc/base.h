/* SPDX-License-Identifier: Apache-2.0
 *
 * base.h - what every file of the core may use: types, and arithmetic on sizes.
 */
#ifndef MHA_BASE_H
#define MHA_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
    MHA_OK = 0,
    MHA_NO_MEMORY, /* an allocation failed */
    MHA_TOO_LARGE, /* a size in bytes does not fit size_t */
    MHA_STOPPED,   /* should_stop() returned true; the output is undefined */
} mha_status;

/* The last two are *halves*: numbers of 16 bits. They are stored, and widened to float32, or bfloat16 is multiplied as
 * such. */
typedef enum { MHA_FLOAT32 = 0, MHA_FLOAT64, MHA_BFLOAT16, MHA_FLOAT16 } mha_dtype;

static inline bool mha_is_half(mha_dtype type)
{
    return type == MHA_BFLOAT16 || type == MHA_FLOAT16;
}

/* The type in which numbers of a type are computed. */
static inline mha_dtype mha_computed_in(mha_dtype type)
{
    return mha_is_half(type) ? MHA_FLOAT32 : type;
}

/* Bytes of a number. */
static inline size_t mha_size_of(mha_dtype type)
{
    return type == MHA_FLOAT64 ? sizeof(double) : type == MHA_FLOAT32 ? sizeof(float) : sizeof(uint16_t);
}

/* What a feed-forward network does to each number; GELU_TANH is gelu's approximation by tanh. */
typedef enum { MHA_RELU = 0, MHA_GELU, MHA_GELU_TANH, MHA_SILU, MHA_QUICK_GELU } mha_activation;

/* How rows of some width are normalized; kernels.h has the formula. */
typedef struct {
    const void *weight, *bias; /* [width]; NULL: none */
    double eps;
    bool is_rms; /* no mean is subtracted */
} mha_norm;

/* What the elements of a mask are. */
typedef enum {
    MHA_MASK_NONE = 0,
    MHA_MASK_HIDE,    /* one byte per element, hidden if not 0: the bool masks of torch.nn.MultiheadAttention */
    MHA_MASK_SHOW,    /* one byte per element, hidden if 0: the bool masks of scaled_dot_product_attention */
    MHA_MASK_FLOAT32, /* added to the score, whatever the layer's dtype */
    MHA_MASK_FLOAT64,
} mha_mask_kind;

/* The attention of a query whose keys are all hidden: 0, or NaN as in torch with need_weights=True. */
typedef enum { MHA_EMPTY_ROW_ZERO = 0, MHA_EMPTY_ROW_NAN } mha_empty_row;

/* Only the calling thread asks should_stop(), between its own tasks and within long ones. If the function is NULL, it
 * is never asked. */
typedef struct {
    bool (*should_stop)(void *context);
    void *context;
} mha_stop;

/* ---- Sizes ---- */

static inline size_t mha_divide_up(size_t a, size_t b)
{
    return (a + b - 1) / b;
}

static inline size_t mha_smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

static inline size_t mha_larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* The first element of part i when `total` elements are divided among `parts` as evenly as possible, larger parts
 * first. For i = parts it is `total`. */
static inline size_t mha_first_of_part(size_t total, size_t parts, size_t i)
{
    return total / parts * i + mha_smaller(i, total % parts);
}

#endif
