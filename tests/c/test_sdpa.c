/* SPDX-License-Identifier: Apache-2.0
 *
 * test_sdpa.c - mha_sdpa on small problems, by the level that MHA_C_CPU names or the best of this CPU.
 *
 * Each problem is compared with its definition in doubles, and then with itself: the same bits must come out for any
 * number of threads and any layout of inputs and output. Inputs, masks and outputs touch inaccessible pages. The
 * hashes that are printed must be the same for every level with FMA, on every CPU.
 */
#include "cpu.h"
#include "problems.h"

enum { AXES = 2 };

/* Two axes lead to the heads; along the first, keys, values and mask may be the same for all. */
typedef struct {
    const char *name;
    size_t axes[AXES], H, key_heads, value_heads, L, S, D, Dv;
    mha_mask_kind mask;
    bool mask_per_head, shares_keys, is_causal;
    double scale; /* 0: 1 / sqrt(D) */
} sdpa_problem;

static const sdpa_problem problems[] = {
    {.name = "one of everything", {1, 1}, 1, 1, 1, 1, 1, 1, 1},
    {.name = "as many heads", {2, 3}, 4, 4, 4, 9, 9, 8, 8},
    {.name = "many keys", {1, 2}, 3, 3, 3, 30, 200, 16, 24, .scale = 0.25},
    {.name = "two chains in a head", {1, 1}, 2, 2, 2, 10, 70, 140, 9},
    {.name = "grouped", {2, 2}, 6, 2, 2, 5, 70, 12, 7},
    {.name = "groups of different sizes", {1, 3}, 12, 2, 3, 4, 10, 5, 3},
    {.name = "keys of fewer heads than values", {2, 1}, 8, 2, 8, 7, 66, 4, 4, .mask = MHA_MASK_SHOW,
     .mask_per_head = true},
    {.name = "keys that all share", {3, 2}, 4, 4, 2, 20, 33, 8, 8, .shares_keys = true, .mask = MHA_MASK_FLOAT32},
    {.name = "causal", {2, 2}, 2, 2, 1, 90, 90, 4, 8, .is_causal = true},
    {.name = "causal, fewer keys", {1, 1}, 2, 2, 2, 70, 5, 4, 8, .is_causal = true, .mask = MHA_MASK_HIDE},
    {.name = "hidden pairs", {2, 1}, 2, 1, 2, 66, 130, 4, 8, .mask = MHA_MASK_HIDE, .mask_per_head = true},
    {.name = "mask in float64", {2, 3}, 2, 2, 2, 9, 70, 4, 8, .mask = MHA_MASK_FLOAT64, .mask_per_head = true},
    {.name = "no features", {2, 2}, 2, 2, 2, 3, 70, 0, 8},
    {.name = "no keys", {2, 2}, 2, 2, 2, 3, 0, 4, 8},
    {.name = "no values", {1, 2}, 2, 2, 2, 3, 4, 4, 0},
    {.name = "no queries", {1, 2}, 2, 2, 2, 0, 4, 4, 4},
    {.name = "no items", {3, 0}, 2, 2, 2, 3, 4, 4, 4},
    {.name = "no heads", {2, 2}, 0, 0, 0, 3, 4, 4, 4},
};
enum { PROBLEMS = sizeof problems / sizeof *problems };

/* How a call is made; no result may depend on it. The features of a row are adjacent and aligned in any layout here. */
typedef struct {
    size_t threads, layout, mask_layout;
    guarded_side side;
} sdpa_manner;

static const sdpa_manner plainly = {.threads = 1};

/* ---- A call, and the strides that it points to ---- */

typedef struct {
    mha_sdpa_call call;
    ptrdiff_t strides[5][AXES];
    size_t output_count;
} made_call;

/* An array of both axes, heads, rows and features; the axes' strides. */
static array4 place_heads(const sdpa_problem *p, size_t slot, const size_t size[3], bool is_shared, size_t number_size,
                          size_t layout, guarded_side side, ptrdiff_t strides[AXES])
{
    const size_t all[4] = {(is_shared ? 1 : p->axes[0]) * p->axes[1], size[0], size[1], size[2]};
    const array4 a = place_array(slot, all, number_size, layout, side);
    strides[0] = is_shared ? 0 : (ptrdiff_t)p->axes[1] * a.stride[0];
    strides[1] = a.stride[0];
    return a;
}

static mha_heads as_heads(const array4 *a, mha_dtype dtype, size_t heads, const ptrdiff_t *strides)
{
    return (mha_heads){{a->data, dtype, 0, a->stride[1], a->stride[2], a->stride[3], NULL}, strides, heads};
}

static void make_sdpa_call(const sdpa_problem *p, mha_dtype dtype, const sdpa_manner *m, made_call *made)
{
    const size_t number_size = mha_size_of(dtype);
    const size_t sizes[3][3] = {{p->H, p->L, p->D}, {p->key_heads, p->S, p->D}, {p->value_heads, p->S, p->Dv}};
    array4 inputs[3];
    for (size_t i = 0; i < 3; i++) {
        inputs[i] = place_heads(p, INPUTS + i, sizes[i], i > 0 && p->shares_keys, number_size, m->layout, m->side,
                                made->strides[i]);
        put_random(&inputs[i], dtype, SEED + 30 + i);
    }
    const size_t output_size[3] = {p->H, p->L, p->Dv};
    const array4 output =
        place_heads(p, OUTPUT, output_size, false, number_size, m->layout, m->side, made->strides[4]);
    made->output_count = output.size[0] * output.size[1] * output.size[2] * output.size[3];
    made->call = (mha_sdpa_call){
        .dtype = dtype, .axes = AXES, .length = p->axes, .L = p->L, .S = p->S, .D = p->D, .Dv = p->Dv,
        .query = as_heads(&inputs[0], dtype, p->H, made->strides[0]),
        .key = as_heads(&inputs[1], dtype, p->key_heads, made->strides[1]),
        .value = as_heads(&inputs[2], dtype, p->value_heads, made->strides[2]),
        .is_causal = p->is_causal, .scale = p->scale != 0 ? p->scale : 1 / sqrt((double)p->D),
        .output = as_heads(&output, dtype, p->H, made->strides[4]), .threads = m->threads,
    };
    if (p->mask) {
        const size_t size[3] = {p->mask_per_head ? p->H : 1, p->L, p->S};
        const array4 a = place_heads(p, MASKS, size, p->shares_keys, mask_size(p->mask), m->mask_layout, m->side,
                                     made->strides[3]);
        put_mask(&a, p->mask, true);
        made->call.mask = as_mask(&a, p->mask);
        made->call.mask_axes = made->strides[3];
    }
}

static ptrdiff_t axes_offset(const ptrdiff_t *strides, size_t i, size_t j)
{
    return (ptrdiff_t)i * strides[0] + (ptrdiff_t)j * strides[1];
}

/* The first feature of a row of query head h. */
static const char *row_of(const mha_sdpa_call *c, const mha_heads *x, size_t i, size_t j, size_t h, size_t l)
{
    return mha_row_at(&x->rows, 0, h / (c->query.heads / x->heads), l) + axes_offset(x->axes, i, j);
}

/* The output (axes, heads, rows, features) as doubles. */
static double *read_output(const made_call *made)
{
    const mha_sdpa_call *c = &made->call;
    double *output = malloc(made->output_count * sizeof *output + 1), *y = output;
    for (size_t i = 0; made->output_count && i < c->length[0]; i++)
        for (size_t j = 0; j < c->length[1]; j++)
            for (size_t h = 0; h < c->query.heads; h++)
                for (size_t l = 0; l < c->L; l++)
                    for (size_t d = 0; d < c->Dv; d++)
                        *y++ = get(c->dtype, row_of(c, &c->output, i, j, h, l), (ptrdiff_t)d);
    return output;
}

static double *run(const made_call *made)
{
    const mha_status status = mha_sdpa(&made->call);
    CHECK(status == MHA_OK, "status %d", (int)status);
    for (size_t slot = 0; slot <= OUTPUT; slot++)
        CHECK(!guarded_slots[slot].first || guarded_intact(slot), "wrote beside array %zu", slot);
    return read_output(made);
}

/* ---- The definition ---- */

static double score_of(const mha_sdpa_call *c, size_t i, size_t j, size_t h, size_t l, size_t s)
{
    const char *q = row_of(c, &c->query, i, j, h, l), *k = row_of(c, &c->key, i, j, h, s);
    double score = 0;
    for (size_t d = 0; d < c->D; d++)
        score += get(c->dtype, q, (ptrdiff_t)d) * get(c->dtype, k, (ptrdiff_t)d) * c->scale;
    if (c->mask.kind)
        score += mask_number(c->mask.kind, (const char *)c->mask.data + axes_offset(c->mask_axes, i, j) +
                                               (ptrdiff_t)h * c->mask.stride_h + (ptrdiff_t)l * c->mask.stride_l +
                                               (ptrdiff_t)s * c->mask.stride_s);
    return c->is_causal && s > l ? -INFINITY : score;
}

static double *define_sdpa(const mha_sdpa_call *c, size_t count)
{
    double *output = calloc(count + 1, sizeof *output), *weights = calloc(c->S + 1, sizeof *weights), *y = output;
    for (size_t i = 0; count && i < c->length[0]; i++)
        for (size_t j = 0; j < c->length[1]; j++)
            for (size_t h = 0; h < c->query.heads; h++)
                for (size_t l = 0; l < c->L; l++, y += c->Dv) {
                    for (size_t s = 0; s < c->S; s++)
                        weights[s] = score_of(c, i, j, h, l, s);
                    softmax(weights, c->S, MHA_EMPTY_ROW_ZERO);
                    for (size_t s = 0; s < c->S; s++)
                        for (size_t d = 0; d < c->Dv; d++)
                            y[d] += weights[s] * get(c->dtype, row_of(c, &c->value, i, j, h, s), (ptrdiff_t)d);
                }
    free(weights);
    return output;
}

/* ---- The tests ---- */

/* A half is rounded once, by up to 2^-8 or 2^-11 of its size. Exponentials of bfloat16 are rounded, too, which moves the
 * sum of values below 1 by up to 2^-8. */
static void check_output(mha_dtype dtype, const double *got, const double *wanted, size_t count)
{
    if (mha_is_half(dtype))
        check_within("output", dtype == MHA_BFLOAT16 ? 0x1.01p-8 : 0x1p-11, got, wanted, count);
    else
        check_close("output", dtype, got, wanted, count);
}

static void test_problem(const sdpa_problem *p, mha_dtype dtype, uint64_t *hash)
{
    static const sdpa_manner manners[] = {
        {2, 0, 4, AT_START}, {3, 4, 1, AT_END}, {1, 5, 2, AT_START}, {2, 4, 3, AT_START}};
    made_call made;
    make_sdpa_call(p, dtype, &plainly, &made);
    DESCRIBE("%s %s '%s'", mha_cpu_name(), dtype_name(dtype), p->name);
    double *plain = run(&made), *wanted = define_sdpa(&made.call, made.output_count);
    check_output(dtype, plain, wanted, made.output_count);
    for (size_t i = 0; i < made.output_count; i++)
        hash_number(hash, plain[i]);
    for (size_t i = 0; i < sizeof manners / sizeof *manners; i++) {
        const sdpa_manner *m = &manners[i];
        make_sdpa_call(p, dtype, m, &made);
        DESCRIBE("%s %s '%s', %zu threads, layouts %zu and %zu, guarded at the %s", mha_cpu_name(), dtype_name(dtype),
                 p->name, m->threads, m->layout, m->mask_layout, m->side == AT_END ? "end" : "start");
        double *again = run(&made);
        check_identical("output", again, plain, made.output_count);
        free(again);
    }
    free(plain);
    free(wanted);
}

/* With an identity for the values the output is the weights: dropout leaves them 0 or scaled. */
static void test_dropout(mha_dtype dtype)
{
    static const double rates[] = {0.25, 1};
    const sdpa_problem p = {.name = "dropout", {2, 1}, 2, 2, 2, 40, 80, 8, 80, .is_causal = true};
    for (size_t i = 0; i < sizeof rates / sizeof *rates; i++) {
        made_call made;
        make_sdpa_call(&p, dtype, &plainly, &made);
        for (size_t row = 0; row < p.axes[0] * p.H * p.S; row++)
            for (size_t d = 0; d < p.Dv; d++)
                put(dtype, guarded_slots[INPUTS + 2].data, (ptrdiff_t)(row * p.Dv + d), row % p.S == d);
        DESCRIBE("%s %s dropout %g", mha_cpu_name(), dtype_name(dtype), rates[i]);
        double *weights = run(&made);
        made.call.dropout_p = rates[i];
        made.call.dropout_seed = 5;
        double *got = run(&made);
        made.call.threads = 3;
        double *again = run(&made);
        check_identical("output", again, got, made.output_count);
        size_t kept = 0, visible = 0;
        for (size_t j = 0; j < made.output_count; j++) {
            kept += got[j] != 0;
            visible += weights[j] != 0;
            if (got[j] != 0)
                check_close("weight", dtype, &got[j], &(double){weights[j] / (1 - rates[i])}, 1);
        }
        const double sigma = sqrt(rates[i] * (1 - rates[i]) * (double)visible);
        CHECK(fabs((double)kept - (1 - rates[i]) * (double)visible) <= 5 * sigma, "%zu of %zu kept", kept, visible);
        free(weights);
        free(got);
        free(again);
    }
}

/* Of each head and item; for whole vectors of queries, unless keys are a handful. */
static void test_operations(void)
{
    const size_t lanes = mha_cpu_kernels(MHA_FLOAT32)->lanes;
    made_call made;
    make_sdpa_call(&problems[1], MHA_FLOAT32, &plainly, &made);
    DESCRIBE("operations");
    for (size_t L = 1; L <= 3 * lanes; L++) {
        made.call.L = L;
        for (size_t S = 9; S <= 17; S += 8) {
            made.call.S = S;
            const size_t queries = S == 9 ? L : mha_divide_up(L, lanes) * lanes;
            CHECK(mha_sdpa_operations(&made.call) == 2.0 * 2 * 3 * 4 * (double)(queries * S) * (8 + 8),
                  "%zu queries, %zu keys", L, S);
        }
    }
}

int main(void)
{
    if (!choose_kernels())
        return 2;
    for (int dtype = 0; dtype < 4; dtype++) {
        uint64_t hash = HASH_OF_NOTHING;
        for (size_t i = 0; i < PROBLEMS; i++)
            test_problem(&problems[i], (mha_dtype)dtype, &hash);
        printf("hash sdpa %s %016llx\n", dtype_name((mha_dtype)dtype), (unsigned long long)hash);
        if (!mha_is_half((mha_dtype)dtype))
            test_dropout((mha_dtype)dtype);
    }
    test_operations();
    return check_report("test_sdpa");
}
