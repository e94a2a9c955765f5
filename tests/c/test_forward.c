/* SPDX-License-Identifier: Apache-2.0
 *
 * test_forward.c - mha_forward on small problems, by the level that MHA_C_CPU names or the best of this CPU.
 *
 * Each problem is compared with the definition in problems.h, and then with itself: the same bits must come out for any
 * number of threads, any layout and alignment of the inputs, any kind of weights asked for, and for an item alone.
 * Inputs, masks and results touch inaccessible pages. The hashes that are printed must be the same for every level
 * with FMA, on every CPU.
 *
 *     ./test_forward levels     the names of the levels that this CPU can run, best first
 */
#include "cpu.h"
#include "problems.h"

#define SQUARE(h, d, e) {.H = h, .Hkv = h, .D = d, .Dv = d, .E = e, .Ek = e, .Ev = e, .Eo = e}

#define RAGGED {.H = 6, .Hkv = 2, .D = 5, .Dv = 7, .E = 11, .Ek = 13, .Ev = 3, .Eo = 9}

static const problem problems[] = {
    {.name = "self", .N = 3, .L = 9, .S = 9, .w = SQUARE(2, 8, 16), .has_bias = true, .is_self = true},
    {.name = "self, two chains", .N = 2, .L = 20, .S = 20, .w = SQUARE(3, 50, 150), .has_bias = true,
     .is_self = true},
    {.name = "two chains in a head", .N = 1, .L = 20, .S = 66, .w = SQUARE(1, 140, 20)},
    {.name = "slices of features", .N = 1, .L = 2, .S = 2, .w = SQUARE(2, 20, 4200), .has_bias = true},
    {.name = "slices for many panels", .N = 1, .L = 2, .S = 2, .has_bias = true,
     .w = {.H = 1, .Hkv = 1, .D = 800, .Dv = 8, .E = 2100, .Ek = 16, .Ev = 16, .Eo = 9}},
    {.name = "wide heads, a narrow output", .N = 1, .L = 26, .S = 5, .w = {.H = 1, .Hkv = 1, .D = 700, .Dv = 1100,
     .E = 3, .Ek = 3, .Ev = 3, .Eo = 5}},
    {.name = "one array, of which the keys have fewer features", .N = 2, .L = 9, .S = 9, .w = {.H = 2, .Hkv = 2, .D = 4,
     .Dv = 4, .E = 12, .Ek = 7, .Ev = 9, .Eo = 8}, .has_bias = true, .is_self = true},
    {.name = "widths", .N = 2, .L = 5, .S = 130, .w = RAGGED, .has_bias = true},
    {.name = "one of everything", .N = 1, .L = 1, .S = 1, .w = SQUARE(1, 1, 1), .has_bias = true},
    {.name = "causal", .N = 2, .L = 150, .S = 150, .w = SQUARE(2, 4, 8), .is_causal = true, .is_self = true},
    {.name = "causal, the last query alone in a block", .N = 1, .L = 65, .S = 65, .w = SQUARE(2, 4, 8),
     .is_causal = true},
    {.name = "causal, more keys", .N = 1, .L = 5, .S = 140, .w = SQUARE(2, 4, 8), .is_causal = true},
    {.name = "causal, fewer keys", .N = 1, .L = 90, .S = 7, .w = SQUARE(2, 4, 8), .is_causal = true},
    {.name = "hidden keys", .N = 3, .L = 20, .S = 75, .w = SQUARE(2, 4, 8), .padding = MHA_MASK_HIDE},
    {.name = "padding in float32", .N = 3, .L = 20, .S = 75, .w = SQUARE(2, 4, 8), .padding = MHA_MASK_FLOAT32},
    {.name = "padding in float64", .N = 3, .L = 6, .S = 200, .w = SQUARE(2, 4, 8), .padding = MHA_MASK_FLOAT64,
     .is_causal = true},
    {.name = "hidden pairs", .N = 2, .L = 66, .S = 70, .w = SQUARE(2, 4, 8), .attn = MHA_MASK_HIDE},
    {.name = "shown pairs", .N = 3, .L = 33, .S = 70, .w = SQUARE(2, 4, 8), .attn = MHA_MASK_SHOW,
     .padding = MHA_MASK_SHOW, .attn_per_head = true},
    {.name = "hidden pairs, per head", .N = 3, .L = 17, .S = 70, .w = SQUARE(3, 4, 12), .attn = MHA_MASK_HIDE,
     .attn_per_head = true, .padding = MHA_MASK_HIDE, .empty_row = MHA_EMPTY_ROW_NAN},
    {.name = "float32 mask", .N = 2, .L = 30, .S = 65, .w = SQUARE(2, 4, 8), .attn = MHA_MASK_FLOAT32,
     .padding = MHA_MASK_FLOAT32, .is_causal = true, .has_bias = true},
    {.name = "float64 mask, per head", .N = 2, .L = 30, .S = 65, .w = SQUARE(2, 4, 8), .attn = MHA_MASK_FLOAT64,
     .attn_per_head = true, .empty_row = MHA_EMPTY_ROW_NAN},
    {.name = "bias_k", .N = 3, .L = 10, .S = 64, .w = SQUARE(2, 4, 8), .has_bias_kv = true, .has_bias = true,
     .padding = MHA_MASK_HIDE, .attn = MHA_MASK_HIDE},
    {.name = "zero attention", .N = 2, .L = 10, .S = 7, .w = SQUARE(2, 4, 8), .add_zero_attn = true,
     .is_causal = true},
    {.name = "everything", .N = 3, .L = 70, .S = 131, .w = RAGGED, .has_bias_kv = true, .add_zero_attn = true,
     .has_bias = true, .padding = MHA_MASK_FLOAT32, .attn = MHA_MASK_FLOAT64, .attn_per_head = true},
    {.name = "heads apart", .N = 3, .L = 20, .S = 75, .w = {.H = 4, .Hkv = 2, .D = 64, .Dv = 80, .E = 70, .Ek = 66,
     .Ev = 9, .Eo = 30}, .has_bias = true, .has_bias_kv = true, .add_zero_attn = true, .padding = MHA_MASK_HIDE},
    {.name = "a mask for all heads", .N = 2, .L = 70, .S = 131, .w = RAGGED, .has_bias = true,
     .attn = MHA_MASK_FLOAT32, .padding = MHA_MASK_HIDE},
    {.name = "a mask, heads of two chains", .N = 1, .L = 9, .S = 70, .w = SQUARE(1, 80, 8), .attn = MHA_MASK_FLOAT32},
    {.name = "chunks of items", .N = 49, .L = 9, .S = 40, .w = RAGGED, .has_bias = true, .has_bias_kv = true,
     .add_zero_attn = true, .attn = MHA_MASK_FLOAT32, .attn_per_head = true, .empty_row = MHA_EMPTY_ROW_NAN},
    {.name = "chunks of items with padding", .N = 13, .L = 50, .S = 33, .w = {.H = 2, .Hkv = 2, .D = 64, .Dv = 64,
     .E = 18, .Ek = 18, .Ev = 18, .Eo = 128}, .padding = MHA_MASK_FLOAT32},
    {.name = "few queries, heads apart", .N = 2, .L = 2, .S = 1100, .w = SQUARE(3, 64, 64), .has_bias = true},
    {.name = "few queries", .N = 2, .L = 1, .S = 1100, .w = SQUARE(2, 16, 32), .has_bias = true},
    {.name = "few queries, masks", .N = 3, .L = 2, .S = 700, .w = {.H = 4, .Hkv = 2, .D = 16, .Dv = 24, .E = 20,
     .Ek = 9, .Ev = 10, .Eo = 6}, .has_bias = true, .has_bias_kv = true, .add_zero_attn = true,
     .padding = MHA_MASK_FLOAT64, .attn = MHA_MASK_HIDE},
    {.name = "few queries, few keys left", .N = 3, .L = 2, .S = 700, .w = {.H = 4, .Hkv = 2, .D = 16, .Dv = 24, .E = 20,
     .Ek = 17, .Ev = 18, .Eo = 6}, .has_bias = true, .padding = MHA_MASK_FLOAT64, .attn = MHA_MASK_HIDE},
    {.name = "few queries, a feature beyond a chain", .N = 2, .L = 1, .S = 300, .w = {.H = 4, .Hkv = 4, .D = 16,
     .Dv = 16, .E = 8, .Ek = 65, .Ev = 129, .Eo = 6}, .has_bias = true},
    {.name = "no items", .N = 0, .L = 3, .S = 4, .w = SQUARE(2, 4, 8), .has_bias = true},
    {.name = "no queries", .N = 2, .L = 0, .S = 4, .w = SQUARE(2, 4, 8), .padding = MHA_MASK_HIDE},
    {.name = "no keys", .N = 2, .L = 3, .S = 0, .w = SQUARE(2, 4, 8), .has_bias = true, .padding = MHA_MASK_HIDE,
     .attn = MHA_MASK_FLOAT32, .empty_row = MHA_EMPTY_ROW_NAN},
    {.name = "no features come out", .N = 2, .L = 3, .S = 5, .w = {.H = 2, .Hkv = 2, .D = 4, .Dv = 4, .E = 8, .Ek = 8,
     .Ev = 8}, .has_bias = true},
    {.name = "no features go in", .N = 2, .L = 3, .S = 5, .w = {.H = 2, .Hkv = 2, .D = 4, .Dv = 4, .Eo = 8},
     .has_bias = true, .is_self = true},
    {.name = "no keys but zero", .N = 2, .L = 3, .S = 0, .w = SQUARE(2, 4, 8), .has_bias = true,
     .add_zero_attn = true},
};
enum { PROBLEMS = sizeof problems / sizeof *problems };

/* ---- One call ---- */

/* Whether attention, and also linear maps, of float32 layers multiply bfloat16. */
static bool is_attention_bf16, are_maps_bf16;

static parameters make_given(const problem *p, mha_dtype dtype)
{
    parameters given = make_parameters(p, dtype);
    given.is_attention_bf16 = is_attention_bf16;
    given.narrow = are_maps_bf16 ? BF16 : WIDE;
    return given;
}

/* Against the definition in doubles. Each number that is multiplied is rounded by at most 2^-9 of itself. Scores and
 * outputs are sums of several products, some of whose errors add up. */
static void check_defined(const char *what, mha_dtype dtype, const double *got, const double *wanted, size_t count)
{
    if (is_attention_bf16)
        check_within(what, 0x1p-6, got, wanted, count);
    else
        check_close(what, dtype, got, wanted, count);
}

static const char *kind_name(mha_dtype dtype)
{
    return are_maps_bf16 ? "bfloat16 products" : is_attention_bf16 ? "bfloat16 attention" : dtype_name(dtype);
}

static const manner plainly = {.threads = 1, .wanted = MHA_WANT_PROBABILITIES};

/* The output in the order (N, L, Eo) whatever the call's, and the weights as they are. */
static answer read_results(const problem *p, mha_dtype dtype, const mha_call *c)
{
    const size_t heads = c->wanted == MHA_WANT_PROBABILITIES ? p->w.H : c->wanted != MHA_WANT_NONE;
    const size_t Eo = p->w.Eo;
    answer a = {malloc(c->N * c->L * Eo * sizeof *a.output + 1),
                read_numbers(dtype, c->attn_weights, c->N * heads * c->L * columns_of(p))};
    for (size_t n = 0; n < c->N; n++)
        for (size_t l = 0; l < c->L; l++)
            for (size_t e = 0; e < Eo; e++)
                a.output[(n * c->L + l) * Eo + e] = get(dtype, mha_row_at(&c->output, n, 0, l), (ptrdiff_t)e);
    return a;
}

static answer call_forward(const problem *p, const mha_layer *layer, mha_dtype dtype, const mha_call *c)
{
    const mha_status status = mha_forward(layer, c);
    CHECK(status == MHA_OK, "status %d", (int)status);
    for (size_t slot = 0; slot <= WEIGHTS; slot++)
        CHECK(!guarded_slots[slot].first || guarded_intact(slot), "wrote beside array %zu", slot);
    return read_results(p, dtype, c);
}

static answer run(const problem *p, const mha_layer *layer, mha_dtype dtype, const manner *m)
{
    const mha_call c = make_call(p, dtype, m);
    return call_forward(p, layer, dtype, &c);
}

/* ---- Against the definition ---- */

static void check_definition(const problem *p, const parameters *given, const answer *got)
{
    const mha_call c = make_call(p, given->dtype, &plainly);
    answer wanted = define(p, given, &c, NULL);
    check_defined("output", given->dtype, got->output, wanted.output, p->N * p->L * p->w.Eo);
    check_defined("weights", given->dtype, got->weights, wanted.weights, p->N * p->w.H * p->L * columns_of(p));
    free_answer(&wanted);
}

/* ---- Against itself ---- */

/* The averages of weights per head. */
static void check_averages(const problem *p, mha_dtype dtype, const double *averaged, const double *per_head)
{
    const size_t columns = columns_of(p), H = p->w.H, all = p->L * columns;
    for (size_t i = 0; i < p->N * all; i++) {
        double sum = 0;
        for (size_t h = 0; h < H; h++)
            sum += per_head[(i / all * H + h) * all + i % all];
        check_close("average", dtype, &averaged[i], &(double){sum / (double)H}, 1);
    }
}

static void check_manners(const problem *p, const mha_layer *layer, mha_dtype dtype, const answer *plain)
{
    static const manner manners[] = {
        {1, MHA_WANT_NONE, false, 0, AT_END},       {2, MHA_WANT_NONE, false, 4, AT_START},
        {3, MHA_WANT_NONE, true, 1, AT_END},        {1, MHA_WANT_AVERAGES, false, 2, AT_END},
        {3, MHA_WANT_AVERAGES, true, 3, AT_START},  {2, MHA_WANT_PROBABILITIES, false, 5, AT_START},
        {3, MHA_WANT_PROBABILITIES, false, 2, AT_START}, {1, MHA_WANT_PROBABILITIES, true, 0, AT_END},
    };
    double *averaged = NULL;
    for (size_t i = 0; i < sizeof manners / sizeof *manners; i++) {
        const manner *m = &manners[i];
        DESCRIBE("%s %s '%s', %zu threads, weights %d, L first %d, layout %zu, guarded at the %s", mha_cpu_name(),
                 kind_name(dtype), p->name, m->threads, (int)m->wanted, m->output_l_first, m->layout,
                 m->side == AT_END ? "end" : "start");
        answer a = run(p, layer, dtype, m);
        check_identical("output", a.output, plain->output, p->N * p->L * p->w.Eo);
        if (m->wanted == MHA_WANT_PROBABILITIES)
            check_identical("weights", a.weights, plain->weights, p->N * p->w.H * p->L * columns_of(p));
        if (m->wanted == MHA_WANT_AVERAGES && !averaged) {
            check_averages(p, dtype, a.weights, plain->weights);
            averaged = a.weights;
            a.weights = NULL;
        } else if (m->wanted == MHA_WANT_AVERAGES) {
            check_identical("averages", a.weights, averaged, p->N * p->L * columns_of(p));
        }
        free_answer(&a);
    }
    free(averaged);
}

/* Item n of a call, by itself. */
static void check_items_alone(const problem *p, const mha_layer *layer, mha_dtype dtype, const answer *plain)
{
    const size_t output = p->L * p->w.Eo, of_weights = p->w.H * p->L * columns_of(p);
    for (size_t n = 0; n < p->N; n++) {
        mha_call c = make_call(p, dtype, &plainly);
        mha_rows *inputs[] = {&c.query, &c.key, &c.value};
        mha_mask *masks[] = {&c.attn_mask, &c.key_padding_mask};
        for (size_t i = 0; i < 3; i++)
            inputs[i]->data += (ptrdiff_t)n * inputs[i]->item;
        for (size_t i = 0; i < 2; i++)
            masks[i]->data = masks[i]->kind ? (const char *)masks[i]->data + (ptrdiff_t)n * masks[i]->stride_n : NULL;
        c.N = 1;
        DESCRIBE("%s %s '%s', item %zu alone", mha_cpu_name(), kind_name(dtype), p->name, n);
        answer a = call_forward(p, layer, dtype, &c);
        check_identical("output", a.output, plain->output + n * output, output);
        check_identical("weights", a.weights, plain->weights + n * of_weights, of_weights);
        free_answer(&a);
    }
}

static void test_problem(const problem *p, mha_dtype dtype, uint64_t *hash)
{
    parameters given = make_given(p, dtype);
    mha_layer *layer = NULL;
    DESCRIBE("%s %s '%s'", mha_cpu_name(), kind_name(dtype), p->name);
    const mha_status status = pack_parameters(p, &given, &layer);
    CHECK(status == MHA_OK, "status %d", (int)status);
    if (!layer)
        return;
    answer plain = run(p, layer, dtype, &plainly);
    check_definition(p, &given, &plain);
    for (size_t i = 0; i < p->N * p->L * p->w.Eo; i++)
        hash_number(hash, plain.output[i]);
    for (size_t i = 0; i < p->N * p->w.H * p->L * columns_of(p); i++)
        hash_number(hash, plain.weights[i]);
    check_manners(p, layer, dtype, &plain);
    check_items_alone(p, layer, dtype, &plain);
    free_answer(&plain);
    mha_layer_destroy(layer);
    free_parameters(&given);
}

/* ---- Padding, hidden numbers and dropout ---- */

/* Keys behind the last one that counts change nothing, however many there are and whatever they hold. */
static void test_padding(mha_dtype dtype)
{
    const problem shorter = {.name = "unpadded", .N = 1, .L = 4, .S = 70, .w = RAGGED, .has_bias = true};
    problem longer = shorter;
    longer.S = 200;
    parameters given = make_given(&shorter, dtype);
    mha_layer *layer = NULL;
    DESCRIBE("%s %s padding", mha_cpu_name(), kind_name(dtype));
    CHECK(pack_parameters(&shorter, &given, &layer) == MHA_OK, "no weights");
    const manner m = {.threads = 1};
    answer wanted = run(&shorter, layer, dtype, &m);
    mha_call c = make_call(&longer, dtype, &m); /* the first numbers are the same: one item, in C order */
    char *hidden = guarded_buffer(MASKS + 1, longer.S, AT_END);
    for (size_t s = 0; s < longer.S; s++)
        hidden[s] = s >= shorter.S;
    c.key_padding_mask = (mha_mask){hidden, MHA_MASK_HIDE, 0, 0, 0, 1};
    put_at(dtype, (char *)guarded_slots[INPUTS + 1].data + shorter.S * (size_t)c.key.row, NAN);
    answer got = call_forward(&longer, layer, dtype, &c);
    check_identical("output", got.output, wanted.output, shorter.L * shorter.w.Eo);
    free_answer(&wanted);
    free_answer(&got);
    mha_layer_destroy(layer);
    free_parameters(&given);
}

/* Every other key is hidden from every query by attn_mask, and holds these numbers in turn. */
static answer run_hidden(const problem *p, const mha_layer *layer, mha_dtype dtype, mha_wanted wanted,
                         const double numbers[3])
{
    const manner m = {.threads = 2, .wanted = wanted};
    const mha_call c = make_call(p, dtype, &m);
    for (size_t s = 0; s < p->S; s += 2) {
        for (size_t l = 0; l < p->L; l++)
            put_mask_number(p->attn, (char *)c.attn_mask.data + (ptrdiff_t)l * c.attn_mask.stride_l +
                                         (ptrdiff_t)s * c.attn_mask.stride_s, 0);
        for (size_t n = 0; n < p->N; n++)
            for (size_t e = 0; e < p->w.Ek; e++)
                put_at(dtype, mha_row_at(&c.key, n, 0, s) + (ptrdiff_t)e * c.key.element, numbers[(s / 2 + e) % 3]);
        for (size_t n = 0; n < p->N; n++)
            for (size_t e = 0; e < p->w.Ev; e++)
                put_at(dtype, mha_row_at(&c.value, n, 0, s) + (ptrdiff_t)e * c.value.element, numbers[(s / 2 + e) % 3]);
    }
    return call_forward(p, layer, dtype, &c);
}

/* What no query sees changes nothing, whatever it is. */
static void test_hidden(mha_dtype dtype)
{
    static const problem all[] = {
        {.name = "hidden numbers", .N = 2, .L = 70, .S = 150, .w = SQUARE(2, 4, 8), .attn = MHA_MASK_HIDE},
        {.name = "hidden numbers, a float mask", .N = 2, .L = 20, .S = 90, .w = RAGGED, .attn = MHA_MASK_FLOAT32},
        {.name = "hidden numbers, scores computed twice", .N = 1, .L = 30, .S = 1500, .w = SQUARE(2, 8, 16),
         .attn = MHA_MASK_HIDE},
        {.name = "hidden numbers, few queries", .N = 2, .L = 2, .S = 700, .w = {.H = 4, .Hkv = 2, .D = 16, .Dv = 24,
         .E = 20, .Ek = 17, .Ev = 18, .Eo = 6}, .has_bias = true, .attn = MHA_MASK_SHOW},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        for (int wanted = 0; wanted < 3; wanted++) {
            const problem *p = &all[i];
            const size_t heads = wanted == MHA_WANT_PROBABILITIES ? p->w.H : wanted != MHA_WANT_NONE;
            parameters given = make_given(p, dtype);
            mha_layer *layer = NULL;
            DESCRIBE("%s %s '%s', weights %d", mha_cpu_name(), kind_name(dtype), p->name, wanted);
            CHECK(pack_parameters(p, &given, &layer) == MHA_OK, "no weights");
            answer zeros = run_hidden(p, layer, dtype, (mha_wanted)wanted, (const double[]){0, 0, 0});
            answer others = run_hidden(p, layer, dtype, (mha_wanted)wanted, (const double[]){NAN, INFINITY, -INFINITY});
            check_identical("output", others.output, zeros.output, p->N * p->L * p->w.Eo);
            check_identical("weights", others.weights, zeros.weights, p->N * heads * p->L * p->S);
            free_answer(&zeros);
            free_answer(&others);
            mha_layer_destroy(layer);
            free_parameters(&given);
        }
}

/* The path of few queries gives an item up when it meets a number that is not finite, be it the last one of a
 * parameter. The item then has the bits of the ordinary path. */
static void test_given_up(mha_dtype dtype)
{
    enum { TOO_LARGE_TOGETHER = PARAMETERS };
    static const int spoilt[] = {K_WEIGHT, V_WEIGHT, K_BIAS, V_BIAS, TOO_LARGE_TOGETHER};
    static const bool ordinary[1];
    const double large = dtype == MHA_FLOAT32 ? 1e30 : 1e300;
    const problem p = {.name = "an item that is given up", .N = 1, .L = 1, .S = 700, .w = {.H = 4, .Hkv = 4, .D = 65,
                       .Dv = 65, .E = 8, .Ek = 65, .Ev = 65, .Eo = 6}, .has_bias = true};
    size_t rows[PARAMETERS], columns[PARAMETERS];
    parameter_shapes(&p, rows, columns);
    for (size_t i = 0; i < sizeof spoilt / sizeof *spoilt; i++) {
        parameters given = make_given(&p, dtype);
        if (spoilt[i] == TOO_LARGE_TOGETHER) { /* finite, but the product of a query's feature and a key's is not */
            put(dtype, given.array[Q_BIAS], 1, large);
            put(dtype, given.array[K_BIAS], 1, large);
        } else {
            put(dtype, given.array[spoilt[i]], (ptrdiff_t)(rows[spoilt[i]] * columns[spoilt[i]]) - 1, INFINITY);
        }
        mha_layer *layer = NULL;
        DESCRIBE("%s %s '%s', parameter %d", mha_cpu_name(), kind_name(dtype), p.name, spoilt[i]);
        CHECK(pack_parameters(&p, &given, &layer) == MHA_OK, "no weights");
        mha_call c = make_call(&p, dtype, &plainly);
        bool is_few[1];
        CHECK(mha_choose_paths(layer, &c, is_few) == MHA_OK && is_few[0], "another path");
        answer got = call_forward(&p, layer, dtype, &c);
        c.is_few = ordinary;
        answer wanted = call_forward(&p, layer, dtype, &c);
        check_identical("output", got.output, wanted.output, p.L * p.w.Eo);
        check_identical("weights", got.weights, wanted.weights, p.w.H * p.L * p.S);
        free_answer(&got);
        free_answer(&wanted);
        mha_layer_destroy(layer);
        free_parameters(&given);
    }
}

/* The weights that dropout leaves are 0 or scaled, and the output is made of them. */
static void test_dropout(mha_dtype dtype)
{
    static const double rates[] = {0.1, 0.5, 1};
    for (size_t i = 0; i < sizeof rates / sizeof *rates; i++) {
        problem p = {.name = "dropout", .N = 2, .L = 20, .S = 100, .w = RAGGED, .has_bias = true,
                     .padding = MHA_MASK_HIDE, .is_causal = i == 1, .dropout_p = rates[i]};
        const size_t count = p.N * p.w.H * p.L * p.S;
        parameters given = make_given(&p, dtype);
        mha_layer *layer = NULL;
        DESCRIBE("%s %s dropout %g", mha_cpu_name(), kind_name(dtype), p.dropout_p);
        CHECK(pack_parameters(&p, &given, &layer) == MHA_OK, "no weights");
        answer got = run(&p, layer, dtype, &plainly);
        const mha_call c = make_call(&p, dtype, &plainly);
        answer wanted = define(&p, &given, &c, got.weights);
        check_defined("output", dtype, got.output, wanted.output, p.N * p.L * p.w.Eo);
        size_t kept = 0, visible = 0;
        for (size_t j = 0; j < count; j++) {
            kept += got.weights[j] != 0;
            visible += wanted.weights[j] > 0;
            if (got.weights[j] != 0)
                wanted.weights[j] /= 1 - p.dropout_p;
            else
                wanted.weights[j] = 0;
        }
        check_defined("weights", dtype, got.weights, wanted.weights, count);
        const double sigma = sqrt(p.dropout_p * (1 - p.dropout_p) * (double)visible);
        CHECK(fabs((double)kept - (1 - p.dropout_p) * (double)visible) <= 5 * sigma, "%zu of %zu kept", kept, visible);
        check_manners(&p, layer, dtype, &got);
        free_answer(&got);
        free_answer(&wanted);
        mha_layer_destroy(layer);
        free_parameters(&given);
    }
}

/* ---- Halves ---- */

/* Halves of these parameters, and float32 numbers of the same values in place of the parameters. */
static parameters halve(const problem *p, parameters *given, mha_dtype half)
{
    parameters halves = {.dtype = half};
    size_t rows[PARAMETERS], columns[PARAMETERS];
    parameter_shapes(p, rows, columns);
    for (size_t i = 0; i < PARAMETERS; i++) {
        const size_t count = rows[i] * columns[i];
        uint16_t *bits = given->array[i] ? malloc(count * sizeof *bits + 1) : NULL;
        for (size_t j = 0; bits && j < count; j++) {
            bits[j] = (uint16_t)nearest_half(half, get(MHA_FLOAT32, given->array[i], (ptrdiff_t)j));
            put(MHA_FLOAT32, given->array[i], (ptrdiff_t)j, half_value(half, bits[j]));
        }
        halves.array[i] = bits;
    }
    return halves;
}

/* A layer of halves has the bits of a float32 layer with the same values and products, on the same path. */
static void test_halves(const problem *p, mha_dtype half, bool is_bf16)
{
    parameters given = make_parameters(p, MHA_FLOAT32), halves = halve(p, &given, half);
    mha_layer *wide = NULL, *narrow = NULL;
    DESCRIBE("%s %s '%s', products of bfloat16 %d", mha_cpu_name(), dtype_name(half), p->name, is_bf16);
    given.narrow = halves.narrow = is_bf16 ? BF16 : WIDE;
    given.is_attention_bf16 = halves.is_attention_bf16 = is_bf16;
    const mha_status status = pack_parameters(p, &given, &wide), other = pack_parameters(p, &halves, &narrow);
    CHECK(status == MHA_OK && other == MHA_OK, "status %d and %d", (int)status, (int)other);
    for (size_t threads = 1; wide && narrow && threads < 3; threads++) {
        const manner m = {.threads = threads, .wanted = MHA_WANT_PROBABILITIES, .side = AT_START};
        answer wanted = run(p, wide, MHA_FLOAT32, &m), got = run(p, narrow, MHA_FLOAT32, &m);
        check_identical("output", got.output, wanted.output, p->N * p->L * p->w.Eo);
        check_identical("weights", got.weights, wanted.weights, p->N * p->w.H * p->L * columns_of(p));
        free_answer(&wanted);
        free_answer(&got);
    }
    mha_layer_destroy(wide);
    mha_layer_destroy(narrow);
    free_parameters(&given);
    free_parameters(&halves);
}

static void test_dtype(mha_dtype dtype)
{
    uint64_t hash = HASH_OF_NOTHING;
    for (size_t i = 0; i < PROBLEMS; i++)
        test_problem(&problems[i], dtype, &hash);
    printf("hash forward %s %016llx\n", kind_name(dtype), (unsigned long long)hash);
    test_padding(dtype);
    test_hidden(dtype);
    test_dropout(dtype);
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "levels") == 0) {
        for (size_t i = 0; mha_cpu_supported(i); i++)
            puts(mha_cpu_supported(i));
        return 0;
    }
    if (!choose_kernels())
        return 2;
    test_dtype(MHA_FLOAT32);
    test_dtype(MHA_FLOAT64);
    test_given_up(MHA_FLOAT32);
    test_given_up(MHA_FLOAT64);
    is_attention_bf16 = true;
    test_dtype(MHA_FLOAT32);
    are_maps_bf16 = true;
    test_dtype(MHA_FLOAT32);
    for (size_t i = 0; i < PROBLEMS; i++) {
        test_halves(&problems[i], MHA_BFLOAT16, true);
        test_halves(&problems[i], MHA_BFLOAT16, false);
        test_halves(&problems[i], MHA_FLOAT16, false);
    }
    return check_report("test_forward");
}
