/* SPDX-License-Identifier: Apache-2.0
 *
 * problems.h - small attention problems: what is asked, the memory it lies in, and the answer in plain C and doubles.
 *
 * Owns: guarded slots INPUTS and above, in which the arrays of one call lie, and the parameters of a problem.
 */
#ifndef MHA_TESTS_PROBLEMS_H
#define MHA_TESTS_PROBLEMS_H

#include "check.h"
#include "cpu.h"
#include "guarded.h"
#include "mha.h"
#include "numbers.h"

typedef struct {
    const char *name;
    size_t N, L, S;
    mha_widths w;
    bool has_bias, has_bias_kv, add_zero_attn, is_causal;
    bool is_self; /* query, key and value are one array */
    mha_mask_kind attn, padding;
    bool attn_per_head; /* (N, H, L, S) and not (L, S) for all */
    mha_empty_row empty_row;
    double dropout_p;
} problem;

/* How a call is made; no result may depend on it. */
typedef struct {
    size_t threads;
    mha_wanted wanted;
    bool output_l_first;
    size_t layout; /* of inputs and masks: below LAYOUTS */
    guarded_side side;
} manner;

enum { INPUTS, MASKS = 3, OUTPUT = 5, WEIGHTS, LAYOUTS = 6, SEED = 20 };

/* Before anything is computed. False, after saying why: MHA_C_CPU asks for what this CPU has not. */
static inline bool choose_kernels(void)
{
    const char *reason;
    const bool chosen = mha_cpu_init(&reason);
    if (!chosen)
        fprintf(stderr, "%s\n", reason);
    return chosen;
}

/* ---- Arrays of up to four axes, in any layout ---- */

typedef struct {
    char *data; /* of element 0, 0, 0, 0 */
    size_t size[4];
    ptrdiff_t stride[4]; /* in bytes */
} array4;

static inline char *element(const array4 *a, size_t n, size_t h, size_t l, size_t s)
{
    return a->data + (ptrdiff_t)n * a->stride[0] + (ptrdiff_t)h * a->stride[1] + (ptrdiff_t)l * a->stride[2] +
           (ptrdiff_t)s * a->stride[3];
}

/* An array in a guarded slot. Layouts: 0 C order, 1 Fortran order, 2 unaligned, 3 backwards, 4 the first axis inside
 * the third, as torch has batches, 5 gaps between rows. */
static inline array4 place_array(size_t slot, const size_t size[4], size_t number_size, size_t layout,
                                 guarded_side side)
{
    static const int orders[LAYOUTS][4] = {{3, 2, 1, 0}, {0, 1, 2, 3}, {3, 2, 1, 0},
                                           {3, 2, 1, 0}, {3, 1, 0, 2}, {3, 2, 1, 0}};
    array4 a = {.size = {size[0], size[1], size[2], size[3]}};
    ptrdiff_t step = (ptrdiff_t)number_size + (layout == 2), lowest = 0, highest = 0;
    bool is_empty = false;
    for (int i = 0; i < 4; i++) {
        const int axis = orders[layout][i];
        const ptrdiff_t length = size[axis] > 0 ? (ptrdiff_t)size[axis] : 1;
        is_empty |= size[axis] == 0;
        a.stride[axis] = layout == 3 ? -step : step;
        *(layout == 3 ? &lowest : &highest) += (length - 1) * a.stride[axis];
        step = step * length + (layout == 5 && i == 0 ? 5 * (ptrdiff_t)number_size : 0);
    }
    a.data = (char *)guarded_buffer(slot, is_empty ? 0 : (size_t)(highest - lowest) + number_size, side) - lowest;
    return a;
}

static inline void put_random(const array4 *a, mha_dtype dtype, uint64_t seed)
{
    uint64_t i = 0;
    for (size_t n = 0; n < a->size[0]; n++)
        for (size_t h = 0; h < a->size[1]; h++)
            for (size_t l = 0; l < a->size[2]; l++)
                for (size_t s = 0; s < a->size[3]; s++)
                    put_at(dtype, element(a, n, h, l, s), random_number(dtype, seed, i++));
}

/* ---- Masks ---- */

static inline double mask_number(mha_mask_kind kind, const char *at)
{
    if (kind == MHA_MASK_HIDE || kind == MHA_MASK_SHOW)
        return (*at != 0) == (kind == MHA_MASK_HIDE) ? -INFINITY : 0;
    return get_at(kind == MHA_MASK_FLOAT32 ? MHA_FLOAT32 : MHA_FLOAT64, at);
}

static inline size_t mask_size(mha_mask_kind kind)
{
    return kind == MHA_MASK_FLOAT64 ? sizeof(double) : kind == MHA_MASK_FLOAT32 ? sizeof(float) : 1;
}

/* A third of the keys hidden, the others left alone or, by a float mask, moved. -2^100, the same in every type, leaves
 * nothing of a score. */
static inline void put_mask_number(mha_mask_kind kind, char *at, uint64_t word)
{
    static const double moves[] = {0, 0, 0.5, -2.25, -0x1p100, 1};
    const double x = word % 3 == 0 ? -INFINITY : moves[word / 3 % 6];
    if (kind == MHA_MASK_HIDE || kind == MHA_MASK_SHOW)
        *at = (x == -INFINITY) == (kind == MHA_MASK_HIDE) ? (char)(1 + word % 2) : 0;
    else
        put_at(kind == MHA_MASK_FLOAT32 ? MHA_FLOAT32 : MHA_FLOAT64, at, x);
}

/* Query 1 sees nothing of a mask of queries; of the keys of items, those of the last are all hidden but for one. */
static inline void put_mask(const array4 *a, mha_mask_kind kind, bool of_queries)
{
    for (size_t n = 0; n < a->size[0]; n++)
        for (size_t h = 0; h < a->size[1]; h++)
            for (size_t l = 0; l < a->size[2]; l++)
                for (size_t s = 0; s < a->size[3]; s++) {
                    const uint64_t i = ((n * 31 + h) * 1009 + l) * 10007 + s;
                    const bool hide = of_queries ? l == 1 : n == 2 && s != 1;
                    put_mask_number(kind, element(a, n, h, l, s), hide ? 0 : random_word(SEED + of_queries, i));
                }
}

/* ---- Numbers, compared ---- */

static inline double *read_numbers(mha_dtype dtype, const void *x, size_t count)
{
    double *numbers = malloc(count * sizeof *numbers + 1);
    for (size_t i = 0; i < count; i++)
        numbers[i] = get(dtype, x, (ptrdiff_t)i);
    return numbers;
}

/* Whether numbers differ by at most `error`, relative to numbers around 1. */
static inline void check_within(const char *what, double error, const double *got, const double *wanted, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        const double bound = error * (1 + fabs(wanted[i]));
        CHECK(isnan(wanted[i]) ? isnan(got[i]) : fabs(got[i] - wanted[i]) <= bound, "%s[%zu]: %.17g instead of %.17g",
              what, i, got[i], wanted[i]);
    }
}

static inline void check_close(const char *what, mha_dtype dtype, const double *got, const double *wanted, size_t count)
{
    check_within(what, 64 * eps_of(dtype), got, wanted, count);
}

static inline void check_identical(const char *what, const double *got, const double *wanted, size_t count)
{
    for (size_t i = 0; i < count; i++)
        CHECK(identical(got[i], wanted[i]), "%s[%zu]: %a instead of %a", what, i, got[i], wanted[i]);
}

/* ---- Parameters ---- */

enum { Q_WEIGHT, K_WEIGHT, V_WEIGHT, OUT_WEIGHT, Q_BIAS, K_BIAS, V_BIAS, OUT_BIAS, BIAS_K, BIAS_V, PARAMETERS };

/* What the products of weights read. The numbers of INT8 weights are the bytes of the wide ones, and their scales some
 * of these. */
typedef enum { WIDE = 0, BF16, INT8, NARROWS } narrowness;

typedef struct {
    void *array[PARAMETERS]; /* NULL: the layer has none */
    mha_dtype dtype;
    narrowness narrow; /* WIDE if the dtype is float64 */
    bool is_attention_bf16; /* not with float64 */
} parameters;

static inline void parameter_shapes(const problem *p, size_t rows[PARAMETERS], size_t columns[PARAMETERS])
{
    const size_t q = p->w.H * p->w.D, k = p->w.Hkv * p->w.D, v = p->w.Hkv * p->w.Dv;
    const size_t all_rows[PARAMETERS] = {q, k, v, p->w.Eo, q, k, v, p->w.Eo, k, v};
    const size_t all_columns[PARAMETERS] = {p->w.E, p->w.Ek, p->w.Ev, p->w.H * p->w.Dv, 1, 1, 1, 1, 1, 1};
    memcpy(rows, all_rows, sizeof all_rows);
    memcpy(columns, all_columns, sizeof all_columns);
}

static inline parameters make_parameters(const problem *p, mha_dtype dtype)
{
    parameters made = {.dtype = dtype};
    size_t rows[PARAMETERS], columns[PARAMETERS];
    parameter_shapes(p, rows, columns);
    for (size_t i = 0; i < PARAMETERS; i++) {
        if (i < Q_BIAS || (i < BIAS_K ? p->has_bias : p->has_bias_kv))
            made.array[i] = calloc(rows[i] * (columns[i] + 1), mha_size_of(dtype)); /* room for scales, if depth is 0 */
        for (size_t j = 0; made.array[i] && j < rows[i] * columns[i]; j++)
            put(dtype, made.array[i], (ptrdiff_t)j,
                rounded(dtype, random_number(dtype, i, j) * (i < Q_BIAS ? 2 / sqrt((double)columns[i]) : 1)));
    }
    return made;
}

static inline void free_parameters(parameters *given)
{
    for (size_t i = 0; i < PARAMETERS; i++)
        free(given->array[i]);
}

static inline mha_weight weight_of(void *numbers, narrowness narrow)
{
    return (mha_weight){.numbers = numbers, .scale = narrow == INT8 ? numbers : NULL, .is_bf16 = narrow == BF16};
}

static inline mha_status pack_parameters(const problem *p, const parameters *given, mha_layer **layer)
{
    void *const *a = given->array;
    const mha_parameters packed = {
        .q_weight = weight_of(a[Q_WEIGHT], given->narrow), .k_weight = weight_of(a[K_WEIGHT], given->narrow),
        .v_weight = weight_of(a[V_WEIGHT], given->narrow), .out_weight = weight_of(a[OUT_WEIGHT], given->narrow),
        .q_bias = a[Q_BIAS], .k_bias = a[K_BIAS], .v_bias = a[V_BIAS], .out_bias = a[OUT_BIAS],
        .bias_k = a[BIAS_K], .bias_v = a[BIAS_V], .is_attention_bf16 = given->is_attention_bf16,
    };
    return mha_layer_create(&p->w, given->dtype, &packed, layer);
}

/* ---- A call ---- */

static inline size_t columns_of(const problem *p)
{
    return p->S + (size_t)p->has_bias_kv + (size_t)p->add_zero_attn;
}

static inline mha_rows as_input(const array4 *a, mha_dtype dtype)
{
    return (mha_rows){.data = a->data, .type = dtype, .item = a->stride[0], .row = a->stride[2],
                      .element = a->stride[3]};
}

static inline mha_mask as_mask(const array4 *a, mha_mask_kind kind)
{
    return (mha_mask){a->data, kind, a->size[0] > 1 ? a->stride[0] : 0, a->size[1] > 1 ? a->stride[1] : 0,
                      a->stride[2], a->stride[3]};
}

/* Contiguous rows (N, L), as (L, N). */
static inline void put_queries_first(mha_rows *rows, size_t N)
{
    rows->item = rows->row;
    rows->row *= (ptrdiff_t)N;
}

/* Places inputs, masks and results of a call. */
static inline mha_call make_call(const problem *p, mha_dtype dtype, const manner *m)
{
    const size_t number_size = mha_size_of(dtype);
    const size_t lengths[3] = {p->L, p->S, p->S}, features[3] = {p->w.E, p->w.Ek, p->w.Ev};
    const size_t heads = m->wanted == MHA_WANT_PROBABILITIES ? p->w.H : m->wanted == MHA_WANT_AVERAGES;
    mha_rows inputs[3];
    for (size_t i = 0; i < 3; i++) {
        const size_t size[4] = {p->N, 1, lengths[i], features[i]};
        const array4 a = i > 0 && p->is_self ? (array4){.data = NULL}
                                             : place_array(INPUTS + i, size, number_size, m->layout, m->side);
        put_random(&a, dtype, SEED + 10 + i);
        inputs[i] = i > 0 && p->is_self ? inputs[0] : as_input(&a, dtype);
    }
    mha_call call = {.N = p->N, .L = p->L, .S = p->S, .query = inputs[0], .key = inputs[1], .value = inputs[2],
                     .is_causal = p->is_causal, .add_zero_attn = p->add_zero_attn, .empty_row = p->empty_row,
                     .dropout_p = p->dropout_p, .dropout_seed = 5, .dropout_call = 7, .wanted = m->wanted,
                     .threads = m->threads};
    if (p->attn) {
        const size_t size[4] = {p->attn_per_head ? p->N : 1, p->attn_per_head ? p->w.H : 1, p->L, p->S};
        const array4 a = place_array(MASKS, size, mask_size(p->attn), m->layout, m->side);
        put_mask(&a, p->attn, true);
        call.attn_mask = as_mask(&a, p->attn);
    }
    if (p->padding) {
        const size_t size[4] = {p->N, 1, 1, p->S};
        const array4 a = place_array(MASKS + 1, size, mask_size(p->padding), m->layout, m->side);
        put_mask(&a, p->padding, false);
        call.key_padding_mask = as_mask(&a, p->padding);
    }
    call.output = mha_contiguous_rows(guarded_buffer(OUTPUT, p->N * p->L * p->w.Eo * number_size, m->side), dtype, 1,
                                      p->L, p->w.Eo);
    if (m->output_l_first)
        put_queries_first(&call.output, p->N);
    call.attn_weights = guarded_buffer(WEIGHTS, p->N * heads * p->L * columns_of(p) * number_size, m->side);
    return call;
}

/* ---- The definition ---- */

/* As doubles: output (N, L, Eo), attn_weights (N, H, L, S'). */
typedef struct {
    double *output, *weights;
} answer;

static inline void free_answer(answer *a)
{
    free(a->output);
    free(a->weights);
}

static inline double input_number(mha_dtype dtype, const mha_rows *x, size_t n, size_t l, size_t e)
{
    return get_at(dtype, mha_row_at(x, n, 0, l) + (ptrdiff_t)e * x->element);
}

/* (N, length + extra, width): x W^T + b, then a row of `more` for every item, then zeros. */
static inline double *project(const parameters *given, int weight, const mha_rows *x, size_t N, size_t length,
                              size_t extra, size_t width, size_t features, int more)
{
    const mha_dtype t = given->dtype;
    const void *w = given->array[weight], *bias = given->array[weight + Q_BIAS];
    double *y = calloc(N * (length + extra) * width + 1, sizeof *y);
    for (size_t n = 0; n < N; n++) {
        double *row = y + n * (length + extra) * width;
        for (size_t l = 0; l < length; l++, row += width)
            for (size_t i = 0; i < width; i++) {
                row[i] = bias ? get(t, bias, (ptrdiff_t)i) : 0;
                for (size_t e = 0; e < features; e++)
                    row[i] += input_number(t, x, n, l, e) * get(t, w, (ptrdiff_t)(i * features + e));
            }
        for (size_t i = 0; extra && more >= 0 && given->array[more] && i < width; i++)
            row[i] = get(t, given->array[more], (ptrdiff_t)i);
    }
    return y;
}

/* What the masks add to the score of (n, h, l, s). */
static inline double mask_sum(const mha_call *c, size_t n, size_t h, size_t l, size_t s)
{
    const mha_mask *a = &c->attn_mask, *k = &c->key_padding_mask;
    double sum = 0;
    if (s >= c->S)
        return 0;
    if (a->kind)
        sum += mask_number(a->kind, (const char *)a->data + (ptrdiff_t)n * a->stride_n + (ptrdiff_t)h * a->stride_h +
                                        (ptrdiff_t)l * a->stride_l + (ptrdiff_t)s * a->stride_s);
    if (k->kind)
        sum += mask_number(k->kind, (const char *)k->data + (ptrdiff_t)n * k->stride_n + (ptrdiff_t)s * k->stride_s);
    return c->is_causal && s > l ? -INFINITY : sum;
}

/* Scores become weights. */
static inline void softmax(double *x, size_t count, mha_empty_row empty_row)
{
    double maximum = -INFINITY, sum = 0;
    for (size_t s = 0; s < count; s++)
        maximum = fmax(maximum, x[s]);
    for (size_t s = 0; s < count; s++) {
        x[s] = maximum == -INFINITY ? 0 : exp(x[s] - maximum);
        sum += x[s];
    }
    for (size_t s = 0; s < count; s++)
        x[s] = sum > 0 ? x[s] / sum : empty_row == MHA_EMPTY_ROW_NAN ? NAN : 0;
}

/* softmax(q k^T / sqrt(D) + masks) of all heads. */
static inline double *weigh(const problem *p, const mha_call *c, const double *q, const double *k)
{
    const size_t H = p->w.H, D = p->w.D, columns = columns_of(p), shared = H / p->w.Hkv;
    double *weights = calloc(p->N * H * p->L * columns + 1, sizeof *weights), *row = weights;
    for (size_t n = 0; n < p->N; n++)
        for (size_t h = 0; h < H; h++)
            for (size_t l = 0; l < p->L; l++, row += columns) {
                for (size_t s = 0; s < columns; s++) {
                    const double *q_row = q + ((n * p->L + l) * H + h) * D;
                    const double *k_row = k + ((n * columns + s) * p->w.Hkv + h / shared) * D;
                    for (size_t d = 0; d < D; d++)
                        row[s] += q_row[d] * k_row[d] / sqrt((double)D);
                    row[s] += mask_sum(c, n, h, l, s);
                }
                softmax(row, columns, p->empty_row);
            }
    return weights;
}

/* The heads' weighted sums of values, through the output projection. */
static inline double *project_context(const problem *p, const parameters *given, const double *weights,
                                      const double *v)
{
    const size_t H = p->w.H, Dv = p->w.Dv, columns = columns_of(p), shared = H / p->w.Hkv;
    double *output = calloc(p->N * p->L * p->w.Eo + 1, sizeof *output), *context = calloc(H * Dv + 1, sizeof *context);
    for (size_t n = 0; n < p->N; n++)
        for (size_t l = 0; l < p->L; l++) {
            memset(context, 0, H * Dv * sizeof *context);
            for (size_t h = 0; h < H; h++)
                for (size_t s = 0; s < columns; s++)
                    for (size_t d = 0; d < Dv; d++)
                        context[h * Dv + d] += weights[((n * H + h) * p->L + l) * columns + s] *
                                               v[((n * columns + s) * p->w.Hkv + h / shared) * Dv + d];
            for (size_t e = 0; e < p->w.Eo; e++) {
                double *y = &output[(n * p->L + l) * p->w.Eo + e];
                *y = given->array[OUT_BIAS] ? get(given->dtype, given->array[OUT_BIAS], (ptrdiff_t)e) : 0;
                for (size_t i = 0; i < H * Dv; i++)
                    *y += context[i] * get(given->dtype, given->array[OUT_WEIGHT], (ptrdiff_t)(e * H * Dv + i));
            }
        }
    free(context);
    return output;
}

/* `weights`, if not NULL, stands for the softmax: those that dropout left. */
static inline answer define(const problem *p, const parameters *given, const mha_call *c, const double *weights)
{
    const mha_widths *w = &p->w;
    const size_t extra = columns_of(p) - p->S;
    double *q = project(given, Q_WEIGHT, &c->query, p->N, p->L, 0, w->H * w->D, w->E, -1);
    double *k = project(given, K_WEIGHT, &c->key, p->N, p->S, extra, w->Hkv * w->D, w->Ek, BIAS_K);
    double *v = project(given, V_WEIGHT, &c->value, p->N, p->S, extra, w->Hkv * w->Dv, w->Ev, BIAS_V);
    answer a = {.weights = weigh(p, c, q, k)};
    a.output = project_context(p, given, weights ? weights : a.weights, v);
    free(q);
    free(k);
    free(v);
    return a;
}

#endif
