/* SPDX-License-Identifier: Apache-2.0
 *
 * test_block.c - mha_forward of whole layers, by the level that MHA_C_CPU names or the best of this CPU.
 *
 * Each layer gives the bits that its parts give one after the other: for any number of threads, any strides of the
 * input, any padding, with padded rows computed or zero, and for an item alone. Inputs, masks and results touch
 * inaccessible pages. The hashes that are printed must be the same for every level with FMA, on every CPU.
 */
#include "layers.h"

#define WIDTHS(h, d, e) {.H = h, .Hkv = h, .D = d, .Dv = d, .E = e, .Ek = e, .Ev = e, .Eo = e}

/* Which keys of which items the padding hides, whatever the problem says of padding. */
typedef enum { NOTHING = 0, RIGHT, LEFT, HOLES, WHOLE_ITEMS, EVERYTHING } padding;

typedef struct {
    problem p;
    surroundings s;
    padding padded;
} block_problem;

static const block_problem problems[] = {
    {{.name = "one of everything", .N = 1, .L = 1, .S = 1, .w = WIDTHS(1, 1, 1), .is_self = true},
     {.has_network = true, .hidden = 1}, NOTHING},
    {{.name = "norms last", .N = 3, .L = 9, .S = 9, .w = WIDTHS(2, 8, 16), .has_bias = true, .is_self = true},
     {.has_norm_parameters = true, .has_network = true, .hidden = 40}, RIGHT},
    {{.name = "norms first, chains of features", .N = 2, .L = 20, .S = 20, .w = WIDTHS(3, 50, 150), .has_bias = true,
      .is_self = true},
     {.norm_first = true, .has_norm_parameters = true, .has_network = true, .hidden = 131, .activation = MHA_GELU},
     LEFT},
    {{.name = "gated, rms", .N = 3, .L = 33, .S = 33, .w = WIDTHS(2, 6, 12), .is_self = true},
     {.norm_first = true, .is_rms = true, .has_network = true, .is_gated = true, .hidden = 37, .activation = MHA_SILU},
     HOLES},
    {{.name = "gated, gelu, grouped heads", .N = 3, .L = 33, .S = 33, .w = {.H = 6, .Hkv = 2, .D = 5, .Dv = 7, .E = 11,
      .Ek = 11, .Ev = 11, .Eo = 11}, .has_bias = true, .is_self = true},
     {.has_norm_parameters = true, .has_network = true, .is_gated = true, .hidden = 20, .activation = MHA_GELU}, HOLES},
    {{.name = "no network, norms last", .N = 3, .L = 70, .S = 70, .w = WIDTHS(2, 8, 16), .is_self = true},
     {.hidden = 0}, RIGHT},
    {{.name = "no network, norms first", .N = 3, .L = 70, .S = 70, .w = WIDTHS(2, 8, 16), .is_self = true},
     {.norm_first = true, .has_norm_parameters = true}, HOLES},
    {{.name = "no hidden features", .N = 2, .L = 5, .S = 5, .w = WIDTHS(2, 8, 16), .is_self = true},
     {.has_network = true, .hidden = 0, .activation = MHA_QUICK_GELU}, LEFT},
    {{.name = "no hidden features, gated", .N = 2, .L = 5, .S = 5, .w = WIDTHS(2, 8, 16), .is_self = true},
     {.norm_first = true, .has_network = true, .is_gated = true}, NOTHING},
    {{.name = "hidden features in parts", .N = 2, .L = 600, .S = 600, .w = WIDTHS(1, 8, 8), .is_self = true},
     {.has_network = true, .hidden = 4500, .activation = MHA_GELU_TANH}, NOTHING},
    {{.name = "hidden features in parts, gated", .N = 1, .L = 900, .S = 900, .w = WIDTHS(1, 8, 8), .is_self = true},
     {.norm_first = true, .has_network = true, .is_gated = true, .hidden = 3000}, HOLES},
    {{.name = "chunks of items", .N = 49, .L = 9, .S = 9, .w = WIDTHS(2, 8, 16), .has_bias = true, .is_self = true},
     {.has_norm_parameters = true, .has_network = true, .hidden = 40, .activation = MHA_GELU}, NOTHING},
    {{.name = "chunks of padded items", .N = 60, .L = 30, .S = 30, .w = WIDTHS(2, 8, 16), .is_self = true},
     {.norm_first = true, .has_network = true, .hidden = 40}, HOLES},
    {{.name = "whole items hidden", .N = 5, .L = 12, .S = 12, .w = WIDTHS(2, 8, 16), .is_self = true},
     {.has_network = true, .hidden = 40}, WHOLE_ITEMS},
    {{.name = "everything hidden", .N = 3, .L = 12, .S = 12, .w = WIDTHS(2, 8, 16), .is_self = true,
      .empty_row = MHA_EMPTY_ROW_NAN},
     {.norm_first = true, .has_network = true, .hidden = 40}, EVERYTHING},
    {{.name = "causal", .N = 2, .L = 90, .S = 90, .w = WIDTHS(2, 8, 16), .is_self = true, .is_causal = true},
     {.norm_first = true, .has_norm_parameters = true, .has_network = true, .hidden = 40}, LEFT},
    {{.name = "a mask per head", .N = 3, .L = 20, .S = 20, .w = WIDTHS(2, 8, 16), .is_self = true,
      .attn = MHA_MASK_FLOAT32, .attn_per_head = true, .empty_row = MHA_EMPTY_ROW_NAN},
     {.has_network = true, .hidden = 40}, RIGHT},
    {{.name = "float padding", .N = 3, .L = 20, .S = 20, .w = WIDTHS(2, 8, 16), .is_self = true,
      .padding = MHA_MASK_FLOAT64}, {.has_network = true, .hidden = 40}, NOTHING},
    {{.name = "extra keys", .N = 3, .L = 20, .S = 20, .w = WIDTHS(2, 8, 16), .is_self = true, .has_bias_kv = true,
      .add_zero_attn = true}, {.norm_first = true, .has_network = true, .hidden = 40}, HOLES},
    {{.name = "cross attention", .N = 3, .L = 20, .S = 75, .w = {.H = 2, .Hkv = 2, .D = 8, .Dv = 8, .E = 16, .Ek = 13,
      .Ev = 9, .Eo = 16}, .has_bias = true},
     {.norm_first = true, .has_norm_parameters = true, .has_network = true, .hidden = 40}, HOLES},
    {{.name = "cross attention alone", .N = 30, .L = 9, .S = 40, .w = WIDTHS(2, 8, 16), .has_bias = true},
     {.has_norm_parameters = true}, RIGHT},
    {{.name = "few queries", .N = 3, .L = 1, .S = 700, .w = WIDTHS(4, 16, 64), .has_bias = true},
     {.has_norm_parameters = true, .has_network = true, .hidden = 40}, HOLES},
    {{.name = "few queries, norms first", .N = 3, .L = 2, .S = 900, .w = WIDTHS(4, 16, 64), .has_bias = true},
     {.norm_first = true, .has_network = true, .is_gated = true, .hidden = 40, .activation = MHA_SILU}, LEFT},
    {{.name = "few queries, wide heads", .N = 3, .L = 300, .S = 300, .w = WIDTHS(1, 40, 16), .has_bias = true,
      .is_self = true}, {.norm_first = true, .has_network = true, .hidden = 40}, LEFT},
    {{.name = "few queries, very wide values", .N = 4, .L = 40, .S = 40, .w = {.H = 1, .Hkv = 1, .D = 16, .Dv = 1024,
      .E = 16, .Ek = 16, .Ev = 16, .Eo = 16}, .is_self = true}, {.has_network = true, .hidden = 40}, HOLES},
    {{.name = "no items", .N = 0, .L = 3, .S = 3, .w = WIDTHS(2, 8, 16), .is_self = true},
     {.has_network = true, .hidden = 40}, NOTHING},
    {{.name = "no rows", .N = 2, .L = 0, .S = 0, .w = WIDTHS(2, 8, 16), .is_self = true},
     {.norm_first = true, .has_network = true, .hidden = 40}, NOTHING},
    {{.name = "no keys", .N = 2, .L = 3, .S = 0, .w = WIDTHS(2, 8, 16), .has_bias = true},
     {.norm_first = true, .has_network = true, .hidden = 40}, NOTHING},
};
enum { PROBLEMS = sizeof problems / sizeof *problems };

/* ---- Calls ---- */

/* Of the query, and of the key that is the query: features are adjacent. */
enum places { PLAIN = 0, L_FIRST, GAPS, BACKWARDS, BROADCAST, PLACES };

static const size_t layouts[PLACES] = {0, 4, 5, 0, 0};

static bool hides(padding padded, size_t N, size_t S, size_t n, size_t s)
{
    const size_t many = S * n / (N + 1);
    switch (padded) {
    case RIGHT:
        return s >= S - many;
    case LEFT:
        return s < many;
    case HOLES:
        return random_word(60 + n, s) % 3 == 0;
    case WHOLE_ITEMS:
        return n % 2 == 0 || s == n;
    default:
        return padded == EVERYTHING;
    }
}

static void place_padding(const block_problem *q, mha_call *c, guarded_side side)
{
    char *hidden = guarded_buffer(MASKS + 1, c->N * c->S, side);
    for (size_t i = 0; i < c->N * c->S; i++)
        hidden[i] = hides(q->padded, c->N, c->S, i / c->S, i % c->S);
    c->key_padding_mask = (mha_mask){.data = hidden, .kind = MHA_MASK_HIDE, .stride_n = (ptrdiff_t)c->S, .stride_s = 1};
}

static mha_call make_block_call(const block_problem *q, const mha_block *block, mha_dtype dtype, size_t threads,
                                enum places places, guarded_side side)
{
    const manner m = {.threads = threads, .layout = layouts[places], .side = side, .output_l_first = places == L_FIRST};
    mha_call c = make_call(&q->p, dtype, &m);
    if (places == BACKWARDS && c.L > 0) {
        c.query.data += (ptrdiff_t)(c.L - 1) * c.query.row;
        c.query.row = -c.query.row;
    }
    if (places == BROADCAST)
        c.query.item = 0;
    if (q->p.is_self)
        c.key = c.value = c.query;
    if (q->padded)
        place_padding(q, &c, side);
    c.block = block;
    return c;
}

static double *run_block(const mha_layer *layer, const mha_call *c, size_t E, mha_dtype dtype)
{
    double *output = malloc(c->N * c->L * E * sizeof *output + 1);
    const mha_status status = mha_forward(layer, c);
    CHECK(status == MHA_OK, "status %d", (int)status);
    for (size_t slot = 0; slot <= WEIGHTS; slot++)
        CHECK(!guarded_slots[slot].first || guarded_intact(slot), "wrote beside array %zu", slot);
    for (size_t i = 0; i < c->N * c->L * E; i++)
        output[i] = get(dtype, mha_row_at(&c->output, i / E / c->L, 0, i / E % c->L), (ptrdiff_t)(i % E));
    return output;
}

/* What a call has to give, from its steps. */
static double *run_steps(const block_problem *q, const mha_layer *layer, const mha_call *c, mha_dtype dtype)
{
    const size_t E = q->p.w.E, count = c->N * c->L * E;
    char *steps = malloc(count * mha_size_of(dtype) + 1);
    CHECK(compute_in_steps(layer, c, E, q->s.hidden, dtype, steps) == MHA_OK, "no steps");
    double *wanted = read_numbers(dtype, steps, count);
    free(steps);
    return wanted;
}

/* One call against its steps; hash NULL: none. */
static void check_call(const block_problem *q, const mha_layer *layer, const mha_call *c, mha_dtype dtype,
                       const double *wanted, uint64_t *hash)
{
    const size_t count = c->N * c->L * q->p.w.E;
    double *got = run_block(layer, c, q->p.w.E, dtype);
    check_identical("output", got, wanted, count);
    for (size_t i = 0; hash && i < count; i++)
        hash_number(hash, got[i]);
    free(got);
}

static void check_manners(const block_problem *q, const mha_layer *layer, const mha_block *block, mha_dtype dtype,
                          uint64_t *hash)
{
    for (unsigned places = 0; places < PLACES; places++) {
        double *wanted = NULL;
        for (size_t threads = 1; threads < 4; threads++) {
            const guarded_side side = (threads + places) % 2 ? AT_END : AT_START;
            DESCRIBE("%s %s '%s', padding %d, zero %d, %zu threads, places %u", mha_cpu_name(), dtype_name(dtype),
                     q->p.name, (int)q->padded, block->zeroes_padding, threads, places);
            const mha_call c = make_block_call(q, block, dtype, threads, (enum places)places, side);
            if (threads == 1)
                wanted = run_steps(q, layer, &c, dtype);
            check_call(q, layer, &c, dtype, wanted, threads == 1 && places == PLAIN ? hash : NULL);
        }
        free(wanted);
    }
}

/* Item n of a call, by itself. */
static void check_items_alone(const block_problem *q, const mha_layer *layer, const mha_block *block, mha_dtype dtype)
{
    const size_t E = q->p.w.E;
    mha_call c = make_block_call(q, block, dtype, 1, PLAIN, AT_END);
    double *all = run_block(layer, &c, E, dtype);
    const mha_call whole = c;
    for (size_t n = 0; n < whole.N; n++) {
        mha_rows *rows[] = {&c.query, &c.key, &c.value};
        c = whole;
        for (size_t i = 0; i < 3; i++)
            rows[i]->data += (ptrdiff_t)n * rows[i]->item;
        if (c.attn_mask.kind)
            c.attn_mask.data = (const char *)c.attn_mask.data + (ptrdiff_t)n * c.attn_mask.stride_n;
        if (c.key_padding_mask.kind)
            c.key_padding_mask.data =
                (const char *)c.key_padding_mask.data + (ptrdiff_t)n * c.key_padding_mask.stride_n;
        c.N = 1;
        DESCRIBE("%s %s '%s', zero %d, item %zu alone", mha_cpu_name(), dtype_name(dtype), q->p.name,
                 block->zeroes_padding, n);
        double *alone = run_block(layer, &c, E, dtype);
        check_identical("output", alone, all + n * c.L * E, c.L * E);
        free(alone);
    }
    free(all);
}

/* What padded rows hold reaches no other row, and no row at all if padded rows are zero. */
static void check_hidden_numbers(const block_problem *q, const mha_layer *layer, const mha_block *block,
                                 mha_dtype dtype)
{
    static const double bad[] = {NAN, INFINITY, -INFINITY, 0};
    const size_t E = q->p.w.E;
    mha_call c = make_block_call(q, block, dtype, 2, PLAIN, AT_END);
    double *wanted = run_block(layer, &c, E, dtype);
    for (size_t n = 0; n < c.N; n++)
        for (size_t l = 0; l < c.L; l++)
            for (size_t e = 0; e < E && hides(q->padded, c.N, c.S, n, l); e++)
                put_at(dtype, mha_row_at(&c.query, n, 0, l) + (ptrdiff_t)e * c.query.element, bad[(n + l + e) % 4]);
    DESCRIBE("%s %s '%s', zero %d, numbers that are not finite", mha_cpu_name(), dtype_name(dtype), q->p.name,
             block->zeroes_padding);
    double *got = run_block(layer, &c, E, dtype);
    for (size_t r = 0; r < c.N * c.L; r++)
        if (block->zeroes_padding || !hides(q->padded, c.N, c.S, r / c.L, r % c.L))
            check_identical("row", got + r * E, wanted + r * E, E);
    for (size_t i = 0; i < c.N * c.L * E && block->zeroes_padding; i++)
        CHECK(got[i] == 0 || !hides(q->padded, c.N, c.S, i / E / c.L, i / E % c.L), "output[%zu]: %a", i, got[i]);
    free(got);
    free(wanted);
}

static void test_problem(const block_problem *given, mha_dtype dtype, uint64_t *hash)
{
    parameters of_attention = make_parameters(&given->p, dtype);
    mha_layer *layer = NULL;
    DESCRIBE("%s %s '%s'", mha_cpu_name(), dtype_name(dtype), given->p.name);
    CHECK(pack_parameters(&given->p, &of_attention, &layer) == MHA_OK, "no parameters");
    for (int zeroes = 0; zeroes <= (given->p.is_self && (given->padded || given->p.padding)); zeroes++) {
        block_problem q = *given;
        made_block made;
        q.s.zeroes_padding = zeroes;
        CHECK(make_block(&q.p, &q.s, dtype, &made) == MHA_OK, "no layer");
        check_manners(&q, layer, &made.block, dtype, hash);
        check_items_alone(&q, layer, &made.block, dtype);
        if (q.p.is_self && q.padded && q.padded != EVERYTHING)
            check_hidden_numbers(&q, layer, &made.block, dtype);
        free_block(&made);
    }
    mha_layer_destroy(layer);
    free_parameters(&of_attention);
}

/* Items on the path of few queries that a visible infinity sends to the other path: the layer's rows are kept, or
 * computed again. */
static void test_given_up(mha_dtype dtype)
{
    const block_problem q = {{.name = "few queries, given up", .N = 3, .L = 2, .S = 700, .w = WIDTHS(4, 16, 64),
                              .attn = MHA_MASK_HIDE, .has_bias = true},
                             {.norm_first = true, .has_network = true, .hidden = 40}, NOTHING};
    parameters of_attention = make_parameters(&q.p, dtype);
    mha_layer *layer = NULL;
    made_block made;
    CHECK(pack_parameters(&q.p, &of_attention, &layer) == MHA_OK, "no parameters");
    CHECK(make_block(&q.p, &q.s, dtype, &made) == MHA_OK, "no layer");
    for (size_t s = 0; s < q.p.S; s += 97) {
        const mha_call c = make_block_call(&q, &made.block, dtype, 1 + s % 3, PLAIN, AT_END);
        bool is_few[3];
        DESCRIBE("%s %s '%s', key %zu", mha_cpu_name(), dtype_name(dtype), q.p.name, s);
        CHECK(mha_choose_paths(layer, &c, is_few) == MHA_OK && is_few[0] && is_few[1] && is_few[2], "another path");
        put_at(dtype, mha_row_at(&c.value, 1, 0, s) + 3 * c.value.element, INFINITY);
        double *wanted = run_steps(&q, layer, &c, dtype);
        check_call(&q, layer, &c, dtype, wanted, NULL);
        free(wanted);
    }
    free_block(&made);
    mha_layer_destroy(layer);
    free_parameters(&of_attention);
}

/* ---- Activations ---- */

/* For any number of threads, with the factor beside the numbers or without. */
static void test_activations(mha_dtype dtype, uint64_t *hash)
{
    enum { ROWS = 61, WIDTH = 333 };
    char *x = guarded_buffer(INPUTS, 2 * ROWS * WIDTH * mha_size_of(dtype), AT_END);
    for (ptrdiff_t i = 0; i < 2 * ROWS * WIDTH; i++)
        put(dtype, x, i, rounded(dtype, random_number(dtype, 80, (uint64_t)i) * (i % 3 ? 1 : 12)));
    for (unsigned i = 0; i < 2 * (MHA_QUICK_GELU + 1); i++)
        for (size_t threads = 1; threads < 4; threads++) {
            char *y = guarded_buffer(OUTPUT, ROWS * WIDTH * mha_size_of(dtype), threads % 2 ? AT_END : AT_START);
            const mha_activation_call call = {.dtype = dtype, .activation = (mha_activation)(i / 2), .is_gated = i % 2,
                                              .rows = ROWS, .width = WIDTH, .x = x, .y = y, .threads = threads};
            const size_t row = (call.is_gated ? 2u : 1u) * WIDTH * mha_size_of(dtype);
            DESCRIBE("%s %s activation %u, gated %d, %zu threads", mha_cpu_name(), dtype_name(dtype), i / 2,
                     call.is_gated, threads);
            CHECK(mha_apply_activation(&call) == MHA_OK, "no answer");
            for (size_t r = 0; r < ROWS; r++) {
                char wanted[WIDTH * sizeof(double)];
                memcpy(wanted, x + r * row, WIDTH * mha_size_of(dtype));
                mha_cpu_kernels(dtype)->activate(call.activation, wanted, i % 2 ? x + r * row + row / 2 : NULL, WIDTH);
                CHECK(memcmp(wanted, y + r * WIDTH * mha_size_of(dtype), WIDTH * mha_size_of(dtype)) == 0, "row %zu", r);
            }
            for (ptrdiff_t j = 0; j < ROWS * WIDTH && threads == 1; j++)
                hash_number(hash, get(dtype, y, j));
        }
}

/* ---- Halves ---- */

/* A linear map of halves has the bits of one of float32 with the same values. */
static void test_linear_halves(mha_dtype half)
{
    enum { ROWS = 11, DEPTH = 150, FEATURES = 61 };
    uint16_t weight[FEATURES * DEPTH], bias[FEATURES];
    float wide_weight[FEATURES * DEPTH], wide_bias[FEATURES], x[ROWS * DEPTH], y[2][ROWS * FEATURES];
    for (unsigned i = 0; i < FEATURES * DEPTH; i++) {
        weight[i] = (uint16_t)nearest_half(half, random_number(MHA_FLOAT32, 100, i));
        wide_weight[i] = (float)half_value(half, weight[i]);
    }
    for (unsigned i = 0; i < FEATURES; i++) {
        bias[i] = (uint16_t)nearest_half(half, random_number(MHA_FLOAT32, 101, i));
        wide_bias[i] = (float)half_value(half, bias[i]);
    }
    for (unsigned i = 0; i < ROWS * DEPTH; i++)
        x[i] = (float)random_number(MHA_FLOAT32, 102, i);
    for (size_t threads = 1; threads < 4; threads++) {
        const void *const weights[] = {weight, wide_weight}, *const biases[] = {bias, wide_bias};
        const mha_dtype dtypes[] = {half, MHA_FLOAT32};
        DESCRIBE("%s %s linear map, %zu threads", mha_cpu_name(), dtype_name(half), threads);
        for (size_t i = 0; i < 2; i++) {
            mha_linear *linear = NULL;
            const mha_weight weight = {.numbers = weights[i]};
            CHECK(mha_linear_create(dtypes[i], FEATURES, DEPTH, &weight, biases[i], &linear) == MHA_OK, "no map");
            const mha_linear_call call = {.linear = linear, .rows = ROWS, .x = x, .y = y[i], .threads = threads};
            CHECK(mha_apply_linear(&call) == MHA_OK, "no answer");
            mha_linear_destroy(linear);
        }
        CHECK(memcmp(y[0], y[1], sizeof y[0]) == 0, "other bits");
    }
}

int main(void)
{
    if (!choose_kernels())
        return 2;
    for (int dtype = 0; dtype < 2; dtype++) {
        uint64_t hash = HASH_OF_NOTHING;
        for (size_t i = 0; i < PROBLEMS; i++)
            test_problem(&problems[i], (mha_dtype)dtype, &hash);
        test_activations((mha_dtype)dtype, &hash);
        printf("hash block %s %016llx\n", dtype_name((mha_dtype)dtype), (unsigned long long)hash);
        test_given_up((mha_dtype)dtype);
    }
    test_linear_halves(MHA_BFLOAT16);
    test_linear_halves(MHA_FLOAT16);
    return check_report("test_block");
}
