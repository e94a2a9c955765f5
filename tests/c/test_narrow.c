/* SPDX-License-Identifier: Apache-2.0
 *
 * test_narrow.c - products of int8 and bfloat16 against their definition, to the last bit: rows that are quantized,
 * panels of int8 of all widths, whole linear maps, and attention.
 *
 * Kernels of int8 are tested on every level of this CPU, and linear maps on the chosen one. A hash of each stands for
 * the bits: all levels with FMA must give the same.
 */
#include "bench.h"
#include "problems.h"

enum { MAX_NUMBERS = 100, MAX_TEST_ROWS = 18, MAX_WIDTH = 4 * MAX_LANES };

typedef struct {
    const char *name;
    const mha_narrow_kernels *k;
    size_t lanes;
    guarded_side side;
    bool has_fma;
} int8_level;

static float bits_to_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Integer i of a quantized row. */
static int row_integer(const int8_level *at, const uint32_t *row, size_t i)
{
    const void *q = row + MHA_ROW_HEADER;
    return at->k->group == 2 ? ((const int16_t *)q)[i] : ((const int8_t *)q)[i];
}

static float quantized(float x, float largest)
{
    return nearbyintf(x * (127 / largest));
}

static float multiplied(const int8_level *at, float sum, float scale, float addend)
{
    const volatile float product = sum * scale; /* not fused with what follows */
    return at->has_fma ? fmaf(sum, scale, addend) : product + addend;
}

/* ---- Rows ---- */

/* Rows of different kinds: numbers around 1, very small and large ones, zeros, and what is not finite. */
static void fill_row(float *x, size_t n, unsigned kind)
{
    static const float scales[] = {1, 0x1p-119f, 0x1p-121f, 0x1p+120f, 0};
    for (size_t i = 0; i < n; i++)
        x[i] = (float)random_number(MHA_FLOAT32, kind, i) * scales[kind % 5];
    if (kind % 7 == 3 && n > 0)
        x[n / 2] = 40 * scales[kind % 5]; /* far larger than the others */
    if (kind == 8 && n > 0)
        x[n - 1] = NAN;
    if (kind == 9 && n > 0)
        x[0] = -INFINITY;
}

static void check_row(const int8_level *at, const float *x, size_t n)
{
    const mha_narrow_kernels *k = at->k;
    float largest = 0;
    bool is_finite = true;
    for (size_t i = 0; i < n; i++) {
        is_finite &= isfinite(x[i]) != 0;
        largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    }
    const uint32_t bits = k->largest(x, n);
    CHECK(is_finite ? bits_to_float(bits) == largest : bits >= 0x7f800000, "the largest of %zu numbers: %x", n, bits);
    uint32_t *row = guarded_buffer(1, k->row_words(n) * sizeof *row, at->side);
    k->take_row(x, n, bits, row);
    const bool is_zero = is_finite && largest < 0x1p-120f;
    const float scale = is_finite ? is_zero ? 0 : largest / 127 : NAN;
    CHECK_SAME(bits_to_float(row[0]), scale, n, 0);
    int64_t sum = 0;
    const size_t padded = (k->row_words(n) - MHA_ROW_HEADER) * k->group;
    for (size_t i = 0; i < padded; i++) {
        const float q = i < n && is_finite && !is_zero ? quantized(x[i], largest) : 0;
        CHECK(row_integer(at, row, i) == (int)q, "%d instead of %g, at %zu of %zu", row_integer(at, row, i), (double)q,
              i, n);
        sum += (int)q;
    }
    CHECK((int32_t)row[1] == (int32_t)(-k->weight_offset * sum), "sums start with %d", (int32_t)row[1]);
    CHECK(guarded_intact(1), "numbers beyond a row of %zu were written", n);
}

static void test_rows(const int8_level *at)
{
    DESCRIBE("%s rows", at->name);
    for (size_t n = 0; n < MAX_NUMBERS; n++)
        for (unsigned kind = 0; kind < 15; kind++) {
            float *x = guarded_buffer(0, n * sizeof *x, at->side);
            fill_row(x, n, kind);
            check_row(at, x, n);
        }
}

/* ---- Products ---- */

typedef enum { BIAS, NO_ADDEND, SUMS, ADDENDS } addend_kind;

typedef struct {
    size_t rows, depth, panels, vectors;
    addend_kind addend;
} product_case;

static void check_product(const int8_level *at, const product_case *c, uint64_t *hash)
{
    const mha_narrow_kernels *k = at->k;
    const size_t P = c->vectors * at->lanes, width = c->panels * P, groups = (c->depth + k->group - 1) / k->group;
    const size_t a_row = k->row_words(c->depth), panel_bytes = groups * P * k->group;
    static float x[MAX_TEST_ROWS][MAX_NUMBERS];
    static int8_t w[MAX_NUMBERS][MAX_WIDTH];
    uint32_t *a = guarded_buffer(0, c->rows * a_row * sizeof *a, at->side);
    int8_t *b = guarded_buffer(1, c->panels * panel_bytes, at->side);
    float *scale = guarded_buffer(2, width * sizeof *scale, at->side);
    const size_t addends = c->addend == BIAS ? 1 : c->addend == SUMS ? c->rows : 0;
    float *addend = guarded_buffer(3, addends * width * sizeof *addend, at->side);
    float *y = guarded_buffer(4, c->rows * width * sizeof *y, at->side);
    for (size_t r = 0; r < c->rows; r++) {
        for (size_t i = 0; i < c->depth; i++)
            x[r][i] = (float)random_number(MHA_FLOAT32, 3 + r, i);
        k->take_row(x[r], c->depth, k->largest(x[r], c->depth), a + r * a_row);
    }
    for (size_t i = 0; i < c->depth; i++)
        for (size_t lane = 0; lane < width; lane++) {
            int8_t *panel = b + lane / P * panel_bytes;
            w[i][lane] = (int8_t)(random_word(i, lane) % 256);
            panel[(i / k->group * P + lane % P) * k->group + i % k->group] = (int8_t)(w[i][lane] + k->weight_offset);
        }
    for (size_t lane = 0; lane < width; lane++)
        scale[lane] = (float)random_number(MHA_FLOAT32, 1, lane);
    for (size_t i = 0; i < addends * width; i++)
        addend[i] = (float)random_number(MHA_FLOAT32, 2 + i / width, i % width);
    const mha_prefetch prefetch = {(const char *)b, 1, panel_bytes, 0};
    const mha_product product = {.rows = c->rows, .depth = groups, .vectors = c->vectors, .a = a,
                                 .a_row = (ptrdiff_t)a_row, .a_k = 1, .b = b, .b_k = P,
                                 .more_panels = c->panels - 1, .b_panel_bytes = panel_bytes, .b_scale = scale,
                                 .addend = addends ? addend : NULL, .addend_row = c->addend == SUMS ? width : 0,
                                 .c = y, .c_row = width, .prefetch = c->depth % 2 ? &prefetch : NULL};
    k->product(&product);
    for (size_t r = 0; r < c->rows; r++)
        for (size_t lane = 0; lane < width; lane++) {
            int64_t sum = 0;
            for (size_t i = 0; i < c->depth; i++)
                sum += (int64_t)row_integer(at, a + r * a_row, i) * w[i][lane];
            const float added = product.addend ? addend[r * product.addend_row + lane] : 0;
            const float wanted = multiplied(at, (float)sum, bits_to_float(a[r * a_row]) * scale[lane], added);
            CHECK_SAME(y[r * width + lane], wanted, r, lane);
            if (hash && lane < 4) /* panels are as wide as the vectors of a level */
                hash_number(hash, (double)y[r * width + lane]);
        }
    CHECK(guarded_intact(4), "numbers beyond the product were written");
}

static void test_products(const int8_level *at, uint64_t *hash)
{
    static const size_t depths[] = {0, 1, 2, 3, 5, 16, 67};
    for (size_t rows = 0; rows <= MAX_TEST_ROWS; rows++)
        for (size_t d = 0; d < sizeof depths / sizeof *depths; d++)
            for (size_t vectors = 1; vectors <= at->k->vectors; vectors++)
                for (size_t panels = 1; panels <= most_panels(vectors, rows); panels++)
                    for (int addend = 0; addend < ADDENDS; addend++) {
                        const product_case c = {rows, depths[d], panels, vectors, (addend_kind)addend};
                        DESCRIBE("%s product of %zu rows, depth %zu, %zu panels of %zu vectors, addend %d", at->name,
                                 rows, depths[d], panels, vectors, addend);
                        check_product(at, &c, vectors == 1 ? hash : NULL);
                    }
}

static void test_int8_kernels(void)
{
    uint64_t of_levels = HASH_OF_NOTHING;
    bool is_hashed = false;
    for (size_t i = 0; mha_cpu_supported(i); i++)
        for (int side = 0; side < 2; side++) {
            const char *name = mha_cpu_supported(i);
            const int8_level at = {name, mha_cpu_narrow_named(name, MHA_INT8),
                                   mha_cpu_kernels_named(name, MHA_FLOAT32)->lanes, (guarded_side)side,
                                   strcmp(name, "portable") != 0};
            uint64_t hash = HASH_OF_NOTHING;
            test_rows(&at);
            test_products(&at, &hash);
            if (at.has_fma && is_hashed)
                CHECK(hash == of_levels, "%s has other bits than the level before", name);
            if (at.has_fma)
                of_levels = hash;
            is_hashed |= at.has_fma;
        }
}

/* ---- Linear maps ---- */

typedef struct {
    size_t rows, depth, features;
    bool has_bias;
} map_case;

static void *allocated(size_t n, size_t size)
{
    void *memory = calloc(n + 1, size);
    if (!memory)
        exit(2);
    return memory;
}

/* One number of the result of int8: sums of MHA_INT8_FEATURES features, one after another. */
static float number_of_int8(const int8_level *at, const map_case *c, const float *x, const int8_t *w, float scale,
                           float bias)
{
    float largest = 0, y = bias;
    for (size_t k = 0; k < c->depth; k++)
        largest = fabsf(x[k]) > largest ? fabsf(x[k]) : largest;
    for (size_t first = 0; first < c->depth; first += MHA_INT8_FEATURES) {
        int64_t sum = 0;
        for (size_t k = first; k < c->depth && k < first + MHA_INT8_FEATURES; k++)
            sum += (int64_t)quantized(x[k], largest) * w[k];
        y = multiplied(at, (float)sum, largest / 127 * scale, y);
    }
    return y;
}

/* Subnormal numbers become 0, even the largest one, to which the least normal number is the nearest. */
static float as_bf16(float x)
{
    return fabsf(x) < FLT_MIN ? 0 : (float)half_value(MHA_BFLOAT16, nearest_half(MHA_BFLOAT16, (double)x));
}

/* One number of the result of bfloat16: chains of MHA_CHAIN features. Of two neighbours, the second comes first. */
static float number_of_bf16(const int8_level *at, const map_case *c, const float *x, const float *w, float bias)
{
    float y = bias;
    for (size_t first = 0; first < c->depth; first += MHA_CHAIN) {
        const size_t end = c->depth < first + MHA_CHAIN ? c->depth : first + MHA_CHAIN;
        float chain = 0;
        for (size_t k = first; k < end; k++) {
            const size_t swapped = (k - first) % 2 ? k - 1 : k + 1 < end ? k + 1 : k;
            chain = multiplied(at, as_bf16(x[swapped]), as_bf16(w[swapped]), chain);
        }
        y = first || c->has_bias ? y + chain : chain;
    }
    return y;
}

/* Weights are q * scale of int8, or numbers that are rounded to bfloat16. */
static void check_map(const int8_level *at, const map_case *c, bool is_bf16, uint64_t *hash)
{
    float *x = allocated(c->rows * c->depth, sizeof *x), *scale = allocated(c->features, sizeof *scale);
    float *bias = allocated(c->features, sizeof *bias), *y = allocated(c->rows * c->features, sizeof *y);
    int8_t *w = allocated(c->features * c->depth, sizeof *w);
    float *wide = allocated(c->features * c->depth, sizeof *wide);
    mha_linear *linear = NULL;
    for (size_t i = 0; i < c->rows * c->depth; i++)
        x[i] = (float)random_number(MHA_FLOAT32, 5, i) * (i % 11 == 7 ? 0x1p-130f : 1);
    for (size_t i = 5; i < c->rows * c->depth; i += 10)
        x[i] = nextafterf(FLT_MIN, 0);
    for (size_t i = 0; i < c->features * c->depth; i++)
        w[i] = (int8_t)(random_word(6, i) % 255 - 127);
    for (size_t i = 0; i < c->features * c->depth; i++)
        wide[i] = (float)random_number(MHA_FLOAT32, 6, i) * (i % 13 == 5 ? 0x1p-127f : i % 11 == 7 ? 0x1p+100f : 1);
    for (size_t i = 0; i < c->features; i++) {
        scale[i] = (float)random_number(MHA_FLOAT32, 7, i);
        bias[i] = (float)random_number(MHA_FLOAT32, 8, i);
    }
    const mha_weight weight = {.numbers = is_bf16 ? (void *)wide : (void *)w, .scale = is_bf16 ? NULL : scale,
                               .is_bf16 = is_bf16};
    CHECK(mha_linear_create(MHA_FLOAT32, c->features, c->depth, &weight, c->has_bias ? bias : NULL, &linear) == MHA_OK,
          "no map");
    for (size_t threads = 1; linear && threads <= 3; threads++) {
        const mha_linear_call call = {.linear = linear, .rows = c->rows, .x = x, .y = y, .threads = threads};
        DESCRIBE("%s %s map of %zu rows, depth %zu, %zu features, %zu threads", at->name, is_bf16 ? "bf16" : "int8",
                 c->rows, c->depth, c->features, threads);
        memset(y, CANARY, c->rows * c->features * sizeof *y);
        CHECK(mha_apply_linear(&call) == MHA_OK, "no result");
        for (size_t r = 0; r < c->rows; r++)
            for (size_t f = 0; f < c->features; f++) {
                const float *row = x + r * c->depth, added = c->has_bias ? bias[f] : 0;
                const float wanted = is_bf16 ? number_of_bf16(at, c, row, wide + f * c->depth, added)
                                             : number_of_int8(at, c, row, w + f * c->depth, scale[f], added);
                CHECK_SAME(y[r * c->features + f], wanted, r, f);
                hash_number(hash, (double)y[r * c->features + f]);
            }
    }
    mha_linear_destroy(linear);
    free(x);
    free(scale);
    free(bias);
    free(y);
    free(w);
    free(wide);
}

static uint64_t test_maps(bool is_bf16)
{
    static const map_case cases[] = {
        {1, 1, 1, true},     {0, 3, 5, true},     {7, 0, 5, true},      {5, 3, 7, false},    {8, 64, 24, true},
        {130, 65, 49, true}, {3, 384, 100, true}, {9, 8192, 17, false}, {5, 8193, 33, true}, {2, 16385, 130, true},
        {9, 2, 40, false},
    };
    const int8_level at = {.name = mha_cpu_name(), .has_fma = strcmp(mha_cpu_name(), "portable") != 0};
    uint64_t hash = HASH_OF_NOTHING;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_map(&at, &cases[i], is_bf16, &hash);
    return hash;
}

/* ---- Attention ---- */

typedef struct {
    size_t L, S;
    mha_widths w;
    bool is_causal;
} attention_case;

/* Numbers of a projection: (length, heads * width). */
static float *projected(const mha_layer *layer, const mha_call *call, mha_input input, size_t length, size_t width)
{
    float *y = allocated(length * width, sizeof *y);
    const mha_rows x = input == MHA_QUERY ? call->query : input == MHA_KEY ? call->key : call->value;
    const mha_input_projection projection = {.layer = layer, .input = input, .N = 1, .length = length, .x = x,
                                             .y = mha_contiguous_rows(y, MHA_FLOAT32, 1, length, width), .threads = 1};
    CHECK(mha_project_input(&projection) == MHA_OK, "no projection");
    return y;
}

/* The sum of products of `count` pairs of numbers, `a_step` and `b_step` numbers apart. Of two neighbours, the second
 * comes first. */
static float pairs_sum(const int8_level *at, const float *a, size_t a_step, const float *b, size_t b_step, size_t count)
{
    float sum = 0;
    for (size_t i = 0; i < count; i++) {
        const size_t swapped = i % 2 ? i - 1 : i + 1 < count ? i + 1 : i;
        sum = multiplied(at, as_bf16(a[swapped * a_step]), as_bf16(b[swapped * b_step]), sum);
    }
    return sum;
}

/* The context of one query and head, with the kernels' own softmax, in one lane. */
static void context_of_query(const int8_level *at, const attention_case *c, size_t l, const float *q, const float *k,
                             const float *v, float *context)
{
    const mha_kernels *kernels = mha_cpu_kernels(MHA_FLOAT32);
    const size_t lanes = kernels->lanes, D = c->w.D, Dv = c->w.Dv, k_row = c->w.Hkv * D, v_row = c->w.Hkv * Dv;
    static float scaled[1000], scores[MHA_BLOCK_KEYS * MHA_MAX_VECTOR_LANES], exps[MHA_BLOCK_KEYS];
    float maximum[MHA_MAX_VECTOR_LANES], sum[MHA_MAX_VECTOR_LANES], factor[MHA_MAX_VECTOR_LANES];
    for (size_t d = 0; d < D; d++)
        scaled[d] = q[d] * (float)(1 / sqrt((double)D));
    kernels->softmax_begin(maximum, sum, 1);
    for (size_t first = 0; first < c->S; first += MHA_BLOCK_KEYS) {
        const size_t keys = c->S - first < MHA_BLOCK_KEYS ? c->S - first : MHA_BLOCK_KEYS;
        for (size_t i = 0; i < keys * lanes; i++) {
            const size_t key = first + i / lanes;
            float score = c->is_causal && key > l ? -INFINITY : 0;
            for (size_t d = 0; d < D && isfinite(score); d += MHA_CHAIN)
                score += pairs_sum(at, scaled + d, 1, k + key * k_row + d, 1, D - d < MHA_CHAIN ? D - d : MHA_CHAIN);
            scores[i] = score;
        }
        kernels->softmax_step(scores, keys, 1, scores, maximum, sum, factor);
        for (size_t i = 0; i < keys; i++)
            exps[i] = scores[i * lanes];
        for (size_t d = 0; d < Dv; d++) {
            const float chain = pairs_sum(at, v + first * v_row + d, v_row, exps, 1, keys);
            context[d] = first ? multiplied(at, context[d], factor[0], chain) : chain;
        }
    }
    kernels->softmax_end(sum, factor, 1, MHA_EMPTY_ROW_NAN);
    for (size_t d = 0; d < Dv; d++)
        context[d] *= factor[0];
}

static void check_attention(const int8_level *at, const attention_case *c, uint64_t *hash)
{
    const problem p = {.N = 1, .L = c->L, .S = c->S, .w = c->w, .has_bias = true, .is_causal = c->is_causal};
    const size_t H = c->w.H, Dv = c->w.Dv, shared = H / c->w.Hkv;
    parameters given = make_parameters(&p, MHA_FLOAT32);
    given.is_attention_bf16 = true;
    mha_layer *layer = NULL;
    float *context = allocated(c->L * H * Dv, sizeof *context), *wanted = allocated(Dv, sizeof *wanted);
    CHECK(pack_parameters(&p, &given, &layer) == MHA_OK, "no layer");
    for (size_t threads = 1; layer && threads <= 3; threads++) {
        const manner m = {.threads = threads, .wanted = threads == 2 ? MHA_WANT_PROBABILITIES : MHA_WANT_NONE};
        mha_call call = make_call(&p, MHA_FLOAT32, &m);
        call.context = mha_contiguous_rows(context, MHA_FLOAT32, 1, c->L, H * Dv);
        call.is_few = (const bool[]){false}; /* few queries multiply float32 */
        DESCRIBE("%s attention of %zu queries and %zu keys, D %zu, Dv %zu, %zu threads", at->name, c->L, c->S, c->w.D,
                 Dv, threads);
        CHECK(mha_forward(layer, &call) == MHA_OK, "no result");
        float *q = projected(layer, &call, MHA_QUERY, c->L, H * c->w.D);
        float *k = projected(layer, &call, MHA_KEY, c->S, c->w.Hkv * c->w.D);
        float *v = projected(layer, &call, MHA_VALUE, c->S, c->w.Hkv * Dv);
        for (size_t l = 0; l < c->L; l++)
            for (size_t h = 0; h < H; h++) {
                context_of_query(at, c, l, q + (l * H + h) * c->w.D, k + h / shared * c->w.D, v + h / shared * Dv,
                                 wanted);
                for (size_t d = 0; d < Dv; d++) {
                    CHECK_SAME(context[(l * H + h) * Dv + d], wanted[d], l, h * Dv + d);
                    hash_number(hash, (double)wanted[d]);
                }
            }
        free(q);
        free(k);
        free(v);
    }
    mha_layer_destroy(layer);
    free_parameters(&given);
    free(context);
    free(wanted);
}

static uint64_t test_attention(void)
{
    static const attention_case cases[] = {
        {5, 7, {2, 1, 4, 3, 8, 8, 8, 6}, false},       {70, 131, {2, 2, 64, 64, 9, 9, 9, 6}, false},
        {3, 65, {1, 1, 65, 17, 9, 9, 9, 6}, false},    {1, 200, {4, 2, 130, 24, 9, 9, 9, 6}, false},
        {33, 129, {2, 2, 16, 40, 9, 9, 9, 6}, true},   {100, 99, {3, 1, 7, 9, 9, 9, 9, 6}, true},
        {1, 700, {2, 2, 32, 32, 40, 40, 40, 6}, false},
    };
    const int8_level at = {.name = mha_cpu_name(), .has_fma = strcmp(mha_cpu_name(), "portable") != 0};
    uint64_t hash = HASH_OF_NOTHING;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_attention(&at, &cases[i], &hash);
    return hash;
}

int main(void)
{
    const char *reason;
    if (!mha_cpu_init(&reason)) {
        fprintf(stderr, "%s\n", reason);
        return 2;
    }
    test_int8_kernels();
    printf("hash int8 maps %016llx\n", (unsigned long long)test_maps(false));
    printf("hash bf16 maps %016llx\n", (unsigned long long)test_maps(true));
    printf("hash bf16 attention %016llx\n", (unsigned long long)test_attention());
    return check_report("test_narrow");
}
