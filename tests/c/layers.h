/* SPDX-License-Identifier: Apache-2.0
 *
 * layers.h - a whole layer around a problem's attention: its parameters, and the same layer step by step.
 *
 * Owns: the parameters of a layer besides those of its attention.
 */
#ifndef MHA_TESTS_LAYERS_H
#define MHA_TESTS_LAYERS_H

#include "problems.h"

typedef struct {
    bool norm_first, is_rms, has_norm_parameters;
    bool zeroes_padding; /* needs is_self */
    bool has_network, is_gated;
    size_t hidden; /* numbers that the activation leaves of a row */
    mha_activation activation;
    narrowness narrow; /* of the network */
} surroundings;

typedef struct {
    mha_block block;
    mha_linear *linear1, *linear2;
    void *array[8]; /* weight and bias of each norm, then of each linear map */
} made_block;

static inline void free_block(made_block *made)
{
    mha_linear_destroy(made->linear1);
    mha_linear_destroy(made->linear2);
    for (size_t i = 0; i < 8; i++)
        free(made->array[i]);
}

static inline void *random_array(mha_dtype dtype, size_t count, double scale, uint64_t seed)
{
    void *x = malloc(count * mha_size_of(dtype) + 1);
    for (size_t i = 0; i < count; i++)
        put(dtype, x, (ptrdiff_t)i, rounded(dtype, random_number(dtype, seed, i) * scale));
    return x;
}

/* To be released with free_block(), whatever the status. */
static inline mha_status make_block(const problem *p, const surroundings *s, mha_dtype dtype, made_block *made)
{
    const size_t E = p->w.E, wide = s->hidden * (s->is_gated ? 2 : 1);
    mha_status status = MHA_OK;
    *made = (made_block){.linear1 = NULL};
    for (size_t i = 0; i < 4 && s->has_norm_parameters; i++)
        made->array[i] = random_array(dtype, E, 1.5, 40 + i);
    if (s->has_network) {
        made->array[4] = random_array(dtype, wide * E, 2 / sqrt((double)E + 1), 44);
        made->array[5] = random_array(dtype, wide, 1, 45);
        made->array[6] = random_array(dtype, E * s->hidden, 2 / sqrt((double)s->hidden + 1), 46);
        made->array[7] = random_array(dtype, E, 1, 47);
        const mha_weight up = weight_of(made->array[4], s->narrow), down = weight_of(made->array[6], s->narrow);
        status = mha_linear_create(dtype, wide, E, &up, made->array[5], &made->linear1);
        if (status == MHA_OK)
            status = mha_linear_create(dtype, E, s->hidden, &down, made->array[7], &made->linear2);
    }
    const mha_norm norm = {.weight = made->array[0], .bias = made->array[1], .eps = 1e-5, .is_rms = s->is_rms};
    const mha_norm second = {.weight = made->array[2], .bias = made->array[3], .eps = 1e-6, .is_rms = s->is_rms};
    made->block = (mha_block){.norm_first = s->norm_first, .is_self_attention = p->is_self,
                              .zeroes_padding = s->zeroes_padding, .attention_norm = norm, .feed_forward_norm = second,
                              .linear1 = made->linear1, .linear2 = made->linear2, .activation = s->activation,
                              .is_gated = s->is_gated};
    return status;
}

/* ---- Step by step ---- */

/* C-contiguous rows of E numbers; y may be x. */
static inline void normalize_rows(mha_dtype dtype, const mha_norm *norm, size_t rows, size_t E, const char *x, char *y)
{
    const mha_kernels *kernels = mha_cpu_kernels(dtype);
    for (size_t r = 0; r < rows; r++) {
        const mha_norm_rows row = {.rows = 1, .width = E, .x = x + r * E * mha_size_of(dtype),
                                   .y = y + r * E * mha_size_of(dtype), .norm = *norm};
        kernels->normalize(&row);
    }
}

static inline void add_numbers(mha_dtype dtype, size_t count, const char *x, const char *y, char *sum)
{
    for (size_t i = 0; i < count; i++)
        put(dtype, sum, (ptrdiff_t)i, rounded(dtype, get(dtype, x, (ptrdiff_t)i) + get(dtype, y, (ptrdiff_t)i)));
}

static inline mha_status feed_forward_in_steps(const mha_block *b, size_t hidden, mha_dtype dtype, size_t rows,
                                               const char *x, char *y)
{
    const size_t wide = hidden * (b->is_gated ? 2 : 1);
    char *up = malloc(rows * wide * mha_size_of(dtype) + 1), *active = malloc(rows * hidden * mha_size_of(dtype) + 1);
    const mha_linear_call to_hidden = {.linear = b->linear1, .rows = rows, .x = x, .y = up, .threads = 1};
    const mha_activation_call act = {.dtype = dtype, .activation = b->activation, .is_gated = b->is_gated, .rows = rows,
                                     .width = hidden, .x = up, .y = active, .threads = 1};
    const mha_linear_call back = {.linear = b->linear2, .rows = rows, .x = active, .y = y, .threads = 1};
    mha_status status = mha_apply_linear(&to_hidden);
    if (status == MHA_OK)
        status = mha_apply_activation(&act);
    if (status == MHA_OK)
        status = mha_apply_linear(&back);
    free(up);
    free(active);
    return status;
}

static inline bool is_hidden_key(const mha_call *c, size_t n, size_t s)
{
    const mha_mask *k = &c->key_padding_mask;
    const char *at = (const char *)k->data + (ptrdiff_t)n * k->stride_n + (ptrdiff_t)s * k->stride_s;
    return k->kind && mask_number(k->kind, at) == -INFINITY;
}

/* What a call of a layer has to write, C-contiguous (N, L, E), made by the parts of the layer one after the other. */
static inline mha_status compute_in_steps(const mha_layer *layer, const mha_call *c, size_t E, size_t hidden,
                                          mha_dtype dtype, char *y)
{
    const mha_block *b = c->block;
    const size_t rows = c->N * c->L, size = mha_size_of(dtype), bytes = rows * E * size;
    char *x = malloc(bytes + 1), *normal = malloc(bytes + 1), *update = malloc(bytes + 1);
    mha_call attention = *c;
    for (size_t r = 0; r < rows; r++)
        memcpy(x + r * E * size, mha_row_at(&c->query, r / c->L, 0, r % c->L), E * size);
    memcpy(normal, x, bytes);
    if (b->norm_first)
        normalize_rows(dtype, &b->attention_norm, rows, E, x, normal);
    attention.block = NULL;
    attention.threads = 1;
    attention.query = mha_contiguous_rows(normal, dtype, 1, c->L, E);
    if (b->is_self_attention)
        attention.key = attention.value = attention.query;
    attention.output = mha_contiguous_rows(update, dtype, 1, c->L, E);
    mha_status status = mha_forward(layer, &attention);
    add_numbers(dtype, rows * E, x, update, y);
    if (!b->norm_first)
        normalize_rows(dtype, &b->attention_norm, rows, E, y, y);
    if (status == MHA_OK && b->linear1) {
        memcpy(normal, y, bytes);
        if (b->norm_first)
            normalize_rows(dtype, &b->feed_forward_norm, rows, E, y, normal);
        status = feed_forward_in_steps(b, hidden, dtype, rows, normal, update);
        add_numbers(dtype, rows * E, y, update, y);
        if (!b->norm_first)
            normalize_rows(dtype, &b->feed_forward_norm, rows, E, y, y);
    }
    for (size_t r = 0; r < rows && b->zeroes_padding; r++)
        if (is_hidden_key(c, r / c->L, r % c->L))
            memset(y + r * E * size, 0, E * size);
    free(x);
    free(normal);
    free(update);
    return status;
}

#endif
