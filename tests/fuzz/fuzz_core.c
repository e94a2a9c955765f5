/* SPDX-License-Identifier: Apache-2.0
 *
 * fuzz_core.c - libFuzzer: layers and calls of any widths, lengths, masks and strides, none of which may touch a byte
 * that is not theirs; small ones are compared with the definition, whole layers with their steps.
 *
 * The bytes that libFuzzer invents say what is asked; numbers come from a seed among them. Every array is malloc'ed to
 * the byte, so that AddressSanitizer sees whatever lies outside. tests/tools/fuzz.py builds and runs this.
 */
#include "cpu.h"
#include "layers.h"
#include "spare.h"

enum { MAX_NUMBERS = 1 << 15, MAX_OPERATIONS = 1 << 18 };

/* ---- Choices ---- */

typedef struct {
    const uint8_t *next, *end;
} choices;

static size_t choose(choices *c, size_t count)
{
    size_t word = 0;
    for (int i = 0; i < 2 && c->next < c->end; i++)
        word = word << 8 | *c->next++;
    return word % count;
}

static void fail(const char *what, double got, double wanted, size_t i)
{
    fprintf(stderr, "%s: %s[%zu] is %.17g instead of %.17g\n", check_case, what, i, got, wanted);
    abort();
}

static void compare(const char *what, mha_dtype dtype, const void *got, const double *wanted, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        const double x = get(dtype, got, (ptrdiff_t)i), y = wanted[i];
        if (isnan(y) ? !isnan(x) : !(fabs(x - y) <= 64 * eps_of(dtype) * (1 + fabs(y)))) /* as in test_forward.c */
            fail(what, x, y, i);
    }
}

/* ---- Arrays ---- */

typedef struct {
    array4 view;
    char *memory;
} block;

/* Any strides: dense, with gaps, zero, backwards and, where `unit` is 1, unaligned. */
static block place_anywhere(choices *c, const size_t size[4], size_t number_size, size_t unit)
{
    static const ptrdiff_t widen[] = {1, 1, 1, 2, 0, -1, -2, 1};
    block b = {.view = {.size = {size[0], size[1], size[2], size[3]}}};
    const size_t first = choose(c, 4);
    ptrdiff_t step = (ptrdiff_t)number_size, lowest = 0, highest = 0;
    bool is_empty = false;
    for (size_t i = 0; i < 4; i++) {
        const size_t axis = (first + 4 - i) % 4, length = size[axis] > 0 ? size[axis] : 1;
        const ptrdiff_t wider = widen[choose(c, 8)], gap = choose(c, 8) == 7 ? (ptrdiff_t)unit : 0;
        const ptrdiff_t stride = (step + gap) * wider;
        const ptrdiff_t reach = (ptrdiff_t)(length - 1) * stride;
        is_empty |= size[axis] == 0;
        b.view.stride[axis] = stride;
        *(reach < 0 ? &lowest : &highest) += reach;
        step = wider ? (stride < 0 ? -stride : stride) * (ptrdiff_t)length : step; /* numbers overlap wholly or not */
    }
    b.memory = malloc(is_empty ? 1 : (size_t)(highest - lowest) + number_size);
    b.view.data = b.memory - lowest;
    return b;
}

/* Numbers as tests use them, or such as no result can be predicted from. */
static void put_numbers(const array4 *a, mha_dtype dtype, uint64_t seed, bool wild)
{
    static const double strange[] = {NAN, INFINITY, -INFINITY, 3e38, -3e38, 1e-45, 0, -0.0};
    uint64_t i = 0;
    for (size_t n = 0; n < a->size[0]; n++)
        for (size_t h = 0; h < a->size[1]; h++)
            for (size_t l = 0; l < a->size[2]; l++)
                for (size_t s = 0; s < a->size[3]; s++, i++)
                    put_at(dtype, element(a, n, h, l, s),
                           wild && random_word(seed + 1, i) % 4 == 0 ? strange[random_word(seed + 2, i) % 8]
                                                                     : random_number(dtype, seed, i));
}

/* With adjacent features. */
static block place_heads(choices *c, size_t items, size_t heads, size_t rows, size_t features, mha_dtype dtype)
{
    const size_t number_size = size_of(dtype), size[4] = {items, heads, rows, 1};
    block b = place_anywhere(c, size, features ? features * number_size : number_size, number_size);
    b.view.size[3] = features;
    b.view.stride[3] = (ptrdiff_t)number_size;
    return b;
}

static block place_mask(choices *c, const size_t size[4], mha_mask_kind kind, uint64_t seed)
{
    const block b = place_anywhere(c, size, mask_size(kind), 1);
    const uint64_t density = choose(c, 4);
    uint64_t i = 0;
    for (size_t n = 0; n < size[0]; n++)
        for (size_t h = 0; h < size[1]; h++)
            for (size_t l = 0; l < size[2]; l++)
                for (size_t s = 0; s < size[3]; s++) {
                    const uint64_t word = random_word(seed, i++);
                    put_mask_number(kind, element(&b.view, n, h, l, s),
                                    density == 3 ? 0 : word | (word >> 40 & 3) * density);
                }
    return b;
}

/* ---- A layer's forward pass ---- */

static bool sometimes(void *context)
{
    return ++*(size_t *)context % 7 == 0;
}

static problem choose_problem(choices *c)
{
    static const size_t groups[] = {1, 1, 2, 3};
    problem p = {.name = "fuzzed", .N = choose(c, 4), .L = choose(c, 3) ? choose(c, 6) : choose(c, 140),
                 .S = choose(c, 2) ? choose(c, 12) : choose(c, 700)};
    p.w.Hkv = 1 + choose(c, 3);
    p.w.H = p.w.Hkv * groups[choose(c, 4)];
    p.w.D = 1 + (choose(c, 4) ? choose(c, 20) : choose(c, 140));
    p.w.Dv = choose(c, 2) ? p.w.D : 1 + choose(c, 70);
    p.w.E = choose(c, 2) ? choose(c, 40) : choose(c, 300);
    p.w.Ek = choose(c, 2) ? p.w.E : choose(c, 80);
    p.w.Ev = choose(c, 2) ? p.w.Ek : choose(c, 80);
    p.w.Eo = choose(c, 2) ? p.w.E : choose(c, 60);
    p.has_bias = choose(c, 2);
    p.has_bias_kv = choose(c, 4) == 3;
    p.add_zero_attn = choose(c, 4) == 3;
    p.is_causal = choose(c, 3) == 2;
    p.attn = (mha_mask_kind)choose(c, 5);
    p.padding = (mha_mask_kind)choose(c, 5);
    p.attn_per_head = choose(c, 2);
    p.empty_row = (mha_empty_row)choose(c, 2);
    p.dropout_p = choose(c, 8) == 7 ? (double)choose(c, 5) / 4 : 0;
    p.is_self = p.L == p.S && p.w.Ek == p.w.E && p.w.Ev == p.w.E && choose(c, 4);
    return p;
}

static bool is_small(const problem *p)
{
    const mha_widths *w = &p->w;
    const size_t rows = p->N * (p->L + p->S + 2), scores = p->N * w->H * p->L * (p->S + 2);
    return rows * (w->H * (w->D + w->Dv) + 1) * (w->E + w->Ek + w->Ev + w->Eo + 1) < MAX_OPERATIONS &&
           scores * (w->D + w->Dv) < MAX_OPERATIONS;
}

/* As in check_definition() of test_forward.c, except where nothing can be known. */
static void check_answer(const problem *p, const parameters *given, const mha_call *call)
{
    answer wanted = define(p, given, call, NULL);
    for (size_t r = 0; r < p->N * p->L; r++)
        compare("output", given->dtype, mha_row_at(&call->output, r / p->L, 0, r % p->L), wanted.output + r * p->w.Eo,
                p->w.Eo);
    if (call->wanted == MHA_WANT_PROBABILITIES)
        compare("weights", given->dtype, call->attn_weights, wanted.weights, p->N * p->w.H * p->L * columns_of(p));
    free_answer(&wanted);
}

static surroundings choose_surroundings(choices *c, const problem *p, mha_dtype dtype)
{
    surroundings s = {.norm_first = choose(c, 2), .is_rms = choose(c, 2), .has_norm_parameters = choose(c, 2)};
    s.zeroes_padding = p->is_self && p->padding && choose(c, 2);
    s.has_network = choose(c, 4);
    s.is_gated = choose(c, 3) == 2;
    s.hidden = choose(c, 2) ? choose(c, 20) : choose(c, 150);
    s.activation = (mha_activation)choose(c, 5);
    s.narrow = dtype == MHA_FLOAT32 && s.hidden > 0 && p->w.E > 0 ? (narrowness)choose(c, NARROWS) : WIDE;
    return s;
}

static void check_layer(const problem *p, const surroundings *s, mha_dtype dtype, const mha_layer *layer, mha_call *call)
{
    const size_t E = p->w.E;
    char *steps = malloc(p->N * p->L * E * size_of(dtype) + 1);
    call->stop = (mha_stop){.should_stop = NULL};
    if (compute_in_steps(layer, call, E, s->hidden, dtype, steps) != MHA_OK)
        abort();
    for (size_t i = 0; i < p->N * p->L * E; i++) {
        const double wanted = get(dtype, steps, (ptrdiff_t)i);
        const double got = get(dtype, mha_row_at(&call->output, i / E / p->L, 0, i / E % p->L), (ptrdiff_t)(i % E));
        if (!identical(got, wanted))
            fail("layer", got, wanted, i);
    }
    free(steps);
}

static void fuzz_forward(choices *c)
{
    const mha_dtype dtype = (mha_dtype)choose(c, 2);
    const size_t number_size = size_of(dtype);
    const problem p = choose_problem(c);
    const uint64_t seed = choose(c, 1 << 16);
    const bool wild = choose(c, 4) == 3;
    const bool is_whole = choose(c, 3) == 2 && p.w.E == p.w.Eo;
    const surroundings s = is_whole ? choose_surroundings(c, &p, dtype) : (surroundings){.hidden = 0};
    made_block around;
    if (!is_small(&p) && p.N * (p.L + p.S) * (p.w.E + p.w.Ek + p.w.Ev) > MAX_NUMBERS)
        return;
    parameters given = make_parameters(&p, dtype);
    const size_t kind = dtype == MHA_FLOAT32 ? choose(c, 2 * NARROWS) : WIDE;
    given.narrow = (narrowness)(kind % NARROWS);
    given.is_attention_bf16 = kind >= NARROWS;
    mha_layer *layer = NULL;
    if (pack_parameters(&p, &given, &layer) != MHA_OK || make_block(&p, &s, dtype, &around) != MHA_OK)
        abort();
    const size_t lengths[3] = {p.L, p.S, p.S}, features[3] = {p.w.E, p.w.Ek, p.w.Ev};
    block inputs[3] = {{.memory = NULL}}, masks[2] = {{.memory = NULL}};
    mha_rows x[3];
    for (size_t i = 0; i < 3; i++) {
        const size_t size[4] = {p.N, 1, lengths[i], features[i]};
        if (i == 0 || !p.is_self) {
            inputs[i] = is_whole && i == 0 ? place_heads(c, p.N, 1, p.L, p.w.E, dtype)
                                           : place_anywhere(c, size, number_size, 1);
            put_numbers(&inputs[i].view, dtype, seed + i, wild);
        }
        x[i] = i > 0 && p.is_self ? x[0] : as_input(&inputs[i].view, dtype);
    }
    size_t asked = 0;
    const bool is_l_first = choose(c, 2) == 0;
    mha_call call = {.N = p.N, .L = p.L, .S = p.S, .query = x[0], .key = x[1], .value = x[2], .is_causal = p.is_causal,
                     .add_zero_attn = p.add_zero_attn, .empty_row = p.empty_row, .dropout_p = p.dropout_p,
                     .dropout_seed = seed,
                     .wanted = (mha_wanted)choose(c, is_whole ? 1 : 3), .block = is_whole ? &around.block : NULL, .threads = 1 + choose(c, 4)};
    if (choose(c, 16) == 15)
        call.stop = (mha_stop){.should_stop = sometimes, .context = &asked};
    if (p.attn) {
        const size_t size[4] = {p.attn_per_head ? p.N : 1, p.attn_per_head ? p.w.H : 1, p.L, p.S};
        masks[0] = place_mask(c, size, p.attn, seed + 3);
        call.attn_mask = as_mask(&masks[0].view, p.attn);
    }
    if (p.padding) {
        const size_t size[4] = {p.N, 1, 1, p.S};
        masks[1] = place_mask(c, size, p.padding, seed + 4);
        call.key_padding_mask = as_mask(&masks[1].view, p.padding);
    }
    const size_t heads =
        call.wanted == MHA_WANT_PROBABILITIES ? p.w.H : call.wanted == MHA_WANT_AVERAGES;
    call.output = mha_contiguous_rows(malloc(p.N * p.L * p.w.Eo * number_size + 1), dtype, 1, p.L, p.w.Eo);
    if (is_l_first)
        put_queries_first(&call.output, p.N);
    call.attn_weights = malloc(p.N * heads * p.L * columns_of(&p) * number_size + 1);
    DESCRIBE("%s, N %zu, L %zu, S %zu, H %zu, Hkv %zu, D %zu, Dv %zu, E %zu, Ek %zu, Ev %zu, Eo %zu, attn %d (%d), "
             "padding %d, extra %d%d, causal %d, self %d, threads %zu, weights %d, whole %d, narrow %d (%d) and %d",
             dtype_name(dtype), p.N, p.L, p.S, p.w.H, p.w.Hkv, p.w.D, p.w.Dv, p.w.E, p.w.Ek, p.w.Ev, p.w.Eo,
             (int)p.attn, p.attn_per_head, (int)p.padding, p.has_bias_kv, p.add_zero_attn, p.is_causal, p.is_self,
             call.threads, (int)call.wanted, is_whole, (int)given.narrow, given.is_attention_bf16, (int)s.narrow);
    const mha_status status = mha_forward(layer, &call);
    if (status != MHA_OK && !(status == MHA_STOPPED && asked))
        abort();
    if (status == MHA_OK && is_whole)
        check_layer(&p, &s, dtype, layer, &call);
    else if (status == MHA_OK && !wild && p.dropout_p == 0 && is_small(&p) && !kind)
        check_answer(&p, &given, &call);
    free(call.output.data);
    free(call.attn_weights);
    for (size_t i = 0; i < 3; i++)
        free(inputs[i].memory);
    for (size_t i = 0; i < 2; i++)
        free(masks[i].memory);
    free_block(&around);
    mha_layer_destroy(layer);
    free_parameters(&given);
}

/* ---- Attention alone ---- */

typedef struct {
    size_t items, H, L, S, D, Dv;
    array4 q, k, v, mask; /* axis, head, row, feature; broadcast where a size is 1 */
} sdpa_problem;

static const char *broadcast(const array4 *a, size_t n, size_t h, size_t H, size_t l, size_t s)
{
    return element(a, a->size[0] > 1 ? n : 0, h * a->size[1] / H, l, s);
}

static double *define_sdpa(const sdpa_problem *p, const mha_sdpa_call *call)
{
    double *output = calloc(p->items * p->H * p->L * p->Dv + 1, sizeof *output), *row = output;
    double *weights = calloc(p->S + 1, sizeof *weights);
    for (size_t n = 0; n < p->items; n++)
        for (size_t h = 0; h < p->H; h++)
            for (size_t l = 0; l < p->L; l++, row += p->Dv) {
                for (size_t s = 0; s < p->S; s++) {
                    weights[s] = 0;
                    for (size_t d = 0; d < p->D; d++)
                        weights[s] += call->scale * get_at(call->dtype, broadcast(&p->q, n, h, p->H, l, d)) *
                                      get_at(call->dtype, broadcast(&p->k, n, h, p->H, s, d));
                    if (call->mask.kind)
                        weights[s] += mask_number(call->mask.kind, broadcast(&p->mask, n, h, p->H, l, s));
                    weights[s] = call->is_causal && s > l ? -INFINITY : weights[s];
                }
                softmax(weights, p->S, MHA_EMPTY_ROW_ZERO);
                for (size_t s = 0; s < p->S; s++)
                    for (size_t d = 0; d < p->Dv; d++)
                        row[d] += weights[s] * get_at(call->dtype, broadcast(&p->v, n, h, p->H, s, d));
            }
    free(weights);
    return output;
}

static mha_heads as_heads(const array4 *a, mha_dtype dtype, ptrdiff_t *axes)
{
    *axes = a->size[0] > 1 ? a->stride[0] : 0;
    return (mha_heads){{a->data, dtype, 0, a->size[1] > 1 ? a->stride[1] : 0, a->stride[2], a->stride[3], NULL},
                       axes, a->size[1]};
}

static void fuzz_sdpa(choices *c)
{
    static const size_t heads[][4] = {
        {1, 1, 1, 1}, {4, 4, 4, 4}, {4, 2, 2, 1}, {6, 2, 3, 6}, {6, 1, 6, 1}, {2, 2, 1, 2}};
    const mha_dtype dtype = (mha_dtype)choose(c, 2);
    const size_t *H = heads[choose(c, 6)];
    sdpa_problem p = {.items = choose(c, 4), .H = H[0], .L = choose(c, 2) ? choose(c, 8) : choose(c, 150),
                      .S = choose(c, 2) ? choose(c, 8) : choose(c, 300), .D = choose(c, 70), .Dv = choose(c, 70)};
    const uint64_t seed = choose(c, 1 << 16);
    const bool wild = choose(c, 4) == 3;
    const mha_mask_kind kind = (mha_mask_kind)choose(c, 5);
    if (p.items * p.H * p.L * p.S * (p.D + p.Dv) > 32 * MAX_OPERATIONS)
        return;
    block q = place_heads(c, p.items, p.H, p.L, p.D, dtype);
    block k = place_heads(c, choose(c, 2) ? p.items : 1, H[1], p.S, p.D, dtype);
    block v = place_heads(c, choose(c, 2) ? p.items : 1, H[2], p.S, p.Dv, dtype), mask = {.memory = NULL};
    if (q.view.stride[2] < 0) { /* from the other end */
        q.view.data += (ptrdiff_t)(p.L > 0 ? p.L - 1 : 0) * q.view.stride[2];
        q.view.stride[2] = -q.view.stride[2];
    }
    put_numbers(&q.view, dtype, seed, wild);
    put_numbers(&k.view, dtype, seed + 1, wild);
    put_numbers(&v.view, dtype, seed + 2, wild);
    ptrdiff_t axes[5] = {0};
    mha_sdpa_call call = {.dtype = dtype, .axes = 1, .length = &p.items, .L = p.L, .S = p.S, .D = p.D, .Dv = p.Dv,
                          .query = as_heads(&q.view, dtype, &axes[0]), .key = as_heads(&k.view, dtype, &axes[1]),
                          .value = as_heads(&v.view, dtype, &axes[2]), .mask_axes = &axes[3], .is_causal = choose(c, 3) == 2,
                          .scale = (double)choose(c, 5) / 4, .dropout_p = choose(c, 8) == 7 ? 0.5 : 0,
                          .dropout_seed = seed, .threads = 1 + choose(c, 4)};
    if (kind) {
        const size_t size[4] = {choose(c, 2) ? p.items : 1, H[3], p.L, p.S};
        mask = place_mask(c, size, kind, seed + 3);
        call.mask = as_mask(&mask.view, kind);
        axes[3] = call.mask.stride_n;
        if (H[3] != p.H && H[3] != 1)
            abort();
    }
    p.q = q.view, p.k = k.view, p.v = v.view, p.mask = mask.view;
    char *output = malloc(p.items * p.H * p.L * p.Dv * size_of(dtype) + 1);
    call.output = (mha_heads){mha_contiguous_rows(output, dtype, p.H, p.L, p.Dv), &axes[4], p.H};
    axes[4] = call.output.rows.item;
    DESCRIBE("%s, %zu items, H %zu, %zu, %zu, L %zu, S %zu, D %zu, Dv %zu, mask %d",
             dtype_name(dtype), p.items, p.H, H[1], H[2], p.L, p.S, p.D, p.Dv, (int)kind);
    if (mha_sdpa(&call) != MHA_OK)
        abort();
    if (!wild && call.dropout_p == 0 && p.items * p.H * p.L * p.S * (p.D + p.Dv) < MAX_OPERATIONS) {
        double *wanted = define_sdpa(&p, &call);
        compare("sdpa", dtype, output, wanted, p.items * p.H * p.L * p.Dv);
        free(wanted);
    }
    free(output);
    free(q.memory);
    free(k.memory);
    free(v.memory);
    free(mask.memory);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *reason;
    choices c = {data, data + size};
    if (!mha_cpu_init(&reason))
        abort();
    if (choose(&c, 3) == 2)
        fuzz_sdpa(&c);
    else
        fuzz_forward(&c);
    mha_free_spare(); /* or it would hide reads beyond a workspace that is smaller than the last */
    return 0;
}
