/* SPDX-License-Identifier: Apache-2.0
 *
 * test_softmax.c - the online softmax and the weights of every table this CPU can run, against kernels.h.
 *
 * kernels.h leaves open how exp is computed and in which order a sum is taken. So results are held to a bound, and to
 * bit equality between all levels with FMA: they are compared here between the levels of this CPU and the widths of
 * panels, and the hashes that are printed can be compared with those of another CPU. For that, a case is a number of
 * columns, which panels of any width share out among themselves.
 */
#include "bench.h"

enum { COLUMNS = 50, MAX_BLOCKS = 4, MASKED_COLUMN = 0, LOWEST_COLUMN = 1, LATE_COLUMN = 2 };

typedef struct {
    size_t keys[MAX_BLOCKS]; /* of each block; at most MHA_BLOCK_KEYS */
    size_t blocks;
    double spread; /* scores are in [-spread, spread) */
} softmax_case;

/* All numbers of a run: inputs, and what they become. */
typedef struct {
    double score[MAX_BLOCKS][MHA_BLOCK_KEYS][COLUMNS];
    double p[MAX_BLOCKS][MHA_BLOCK_KEYS][COLUMNS];
    double maximum[MAX_BLOCKS][COLUMNS], sum[MAX_BLOCKS][COLUMNS], factor[MAX_BLOCKS][COLUMNS];
    double divisor[1][COLUMNS], weight[MHA_BLOCK_KEYS][COLUMNS]; /* of the last block */
} softmax_run;

/* One column sees nothing, one has the lowest number only, one sees nothing until the second block. */
static double score_of(mha_dtype dtype, const softmax_case *c, size_t block, size_t key, size_t column)
{
    const uint64_t i = (block * MHA_BLOCK_KEYS + key) * COLUMNS + column;
    if (column == MASKED_COLUMN || (column == LATE_COLUMN && block == 0) || random_word(9, i) % 16 == 0)
        return -INFINITY;
    if (column == LOWEST_COLUMN)
        return lowest_of(dtype);
    return rounded(dtype, c->spread * random_number(dtype, 8, i));
}

static void fill_scores(mha_dtype dtype, const softmax_case *c, softmax_run *run)
{
    memset(run, 0, sizeof *run);
    for (size_t block = 0; block < c->blocks; block++)
        for (size_t key = 0; key < c->keys[block]; key++)
            for (size_t column = 0; column < COLUMNS; column++)
                run->score[block][key][column] = score_of(dtype, c, block, key, column);
}

/* The columns from `first` on, as a panel in a buffer of its own. */
static void *panel_of(const bench *b, size_t slot, size_t rows, double numbers[][COLUMNS], size_t first)
{
    void *panel = buffer(b, slot, rows * b->P);
    for (size_t row = 0; row < rows; row++)
        for (size_t lane = 0; lane < b->P; lane++)
            put(b->dtype, panel, (ptrdiff_t)(row * b->P + lane),
                first + lane < COLUMNS ? numbers[row][first + lane] : 0.5);
    return panel;
}

static void read_panel(const bench *b, const void *panel, size_t rows, double numbers[][COLUMNS], size_t first)
{
    for (size_t row = 0; row < rows; row++)
        for (size_t lane = 0; lane < b->P && first + lane < COLUMNS; lane++)
            numbers[row][first + lane] = get(b->dtype, panel, (ptrdiff_t)(row * b->P + lane));
}

static void run_panel(const bench *b, const softmax_case *c, softmax_run *run, size_t first)
{
    void *maximum = buffer(b, 1, b->P), *sum = buffer(b, 2, b->P), *factor = buffer(b, 3, b->P);
    void *inverse = buffer(b, 4, b->P);
    const size_t last = c->blocks - 1;
    b->k->softmax_begin(maximum, sum, b->vectors);
    for (size_t block = 0; block < c->blocks; block++) {
        void *scores = panel_of(b, 0, c->keys[block], run->score[block], first);
        b->k->softmax_step(scores, c->keys[block], b->vectors, scores, maximum, sum, factor);
        read_panel(b, scores, c->keys[block], run->p[block], first);
        read_panel(b, maximum, 1, &run->maximum[block], first);
        read_panel(b, sum, 1, &run->sum[block], first);
        read_panel(b, factor, 1, &run->factor[block], first);
        CHECK(guarded_intact(0), "wrote beside the scores");
    }
    b->k->softmax_end(sum, inverse, b->vectors, MHA_EMPTY_ROW_ZERO);
    void *scores = panel_of(b, 0, c->keys[last], run->score[last], first);
    b->k->softmax_probabilities(scores, c->keys[last], b->vectors, maximum, sum);
    read_panel(b, sum, 1, run->divisor, first);
    read_panel(b, scores, c->keys[last], run->weight, first);
    for (size_t slot = 0; slot < 5; slot++)
        CHECK(guarded_intact(slot), "wrote beside buffer %zu", slot);
}

static void run_columns(const bench *b, const softmax_case *c, softmax_run *run)
{
    fill_scores(b->dtype, c, run);
    for (size_t first = 0; first < COLUMNS; first += b->P)
        run_panel(b, c, run, first);
}

/* exp(x) may be off by one unit, and by what two roundings of a multiple of ln(2) make; a subnormal one may be 0. */
static bool near_exp(mha_dtype dtype, double got, double x)
{
    const double wanted = exp(x);
    if (x == -INFINITY)
        return got == 0;
    return fabs(got - wanted) <= eps_of(dtype) * (2 + fabs(x)) * wanted + 2 * smallest_of(dtype);
}

/* Block by block, from the numbers that were there before. */
static void check_column(mha_dtype dtype, const softmax_case *c, const softmax_run *run, size_t column)
{
    double maximum = -INFINITY, sum = 0, kernels_maximum = lowest_of(dtype);
    for (size_t block = 0; block < c->blocks; block++) {
        const double new_maximum = run->maximum[block][column], factor = run->factor[block][column];
        double block_sum = 0;
        for (size_t key = 0; key < c->keys[block]; key++)
            maximum = fmax(maximum, run->score[block][key][column]);
        CHECK(maximum == -INFINITY ? isfinite(new_maximum) : new_maximum == maximum,
              "column %zu: maximum %a instead of %a", column, new_maximum, maximum);
        for (size_t key = 0; key < c->keys[block]; key++) {
            const double x = rounded(dtype, run->score[block][key][column] - new_maximum);
            CHECK(near_exp(dtype, run->p[block][key][column], x), "column %zu: %a instead of exp(%a)", column,
                  run->p[block][key][column], x);
            block_sum += run->p[block][key][column];
        }
        CHECK(sum == 0 ? isfinite(factor) : near_exp(dtype, factor, rounded(dtype, kernels_maximum - new_maximum)),
              "column %zu: factor %a", column, factor);
        const double wanted = sum * factor + block_sum;
        CHECK(fabs(run->sum[block][column] - wanted) <= (double)(c->keys[block] + 3) * eps_of(dtype) * wanted,
              "column %zu: sum %a instead of %a", column, run->sum[block][column], wanted);
        kernels_maximum = new_maximum;
        sum = run->sum[block][column];
    }
    for (size_t key = 0; key < c->keys[c->blocks - 1]; key++)
        CHECK_SAME(run->weight[key][column],
                   rounded(dtype, run->p[c->blocks - 1][key][column] / run->divisor[0][column]), column, key);
}

/* What must come out of a column of nothing, and of one whose every score is finfo.min. */
static void check_special_columns(const softmax_case *c, const softmax_run *run)
{
    double visible = 0;
    for (size_t block = 0; block < c->blocks; block++) {
        for (size_t key = 0; key < c->keys[block]; key++) {
            const bool is_hidden = run->score[block][key][LOWEST_COLUMN] == -INFINITY;
            CHECK(run->p[block][key][MASKED_COLUMN] == 0, "a hidden key has a weight");
            CHECK(run->p[block][key][LOWEST_COLUMN] == (is_hidden ? 0 : 1), "finfo.min: weight %a",
                  run->p[block][key][LOWEST_COLUMN]);
            visible += !is_hidden;
        }
        CHECK(run->sum[block][MASKED_COLUMN] == 0, "the sum of nothing is %a", run->sum[block][MASKED_COLUMN]);
        CHECK(run->sum[block][LOWEST_COLUMN] == visible, "finfo.min: sum %a", run->sum[block][LOWEST_COLUMN]);
    }
}

static const softmax_case cases[] = {
    {{64, 64, 64, 7}, 4, 4}, {{1}, 1, 1},           {{0, 5}, 2, 30},        {{5, 0, 3}, 3, 3},
    {{63, 64, 1}, 3, 100},   {{64, 64}, 2, 100000}, {{2, 64, 17, 33}, 4, 20}, {{64}, 1, 0x1p-30},
};
enum { CASES = sizeof cases / sizeof *cases };

static void hash_run(uint64_t *hash, const softmax_run *run)
{
    const double *numbers = (const double *)(const void *)run;
    for (size_t i = 0; i < sizeof *run / sizeof *numbers; i++)
        hash_number(hash, numbers[i]);
}

/* Every level and width of panel on one case, checked each by itself and, where there is an FMA, with the first. */
static void test_case(mha_dtype dtype, const softmax_case *c, uint64_t *hash)
{
    static softmax_run first, run;
    bool is_first = true;
    for (size_t i = 0; mha_cpu_supported(i); i++)
        for (size_t side = 0; side < 2; side++)
            for (size_t v = 1; v <= mha_cpu_kernels_named(mha_cpu_supported(i), dtype)->vectors; v++) {
                const bench b = make_bench(mha_cpu_supported(i), dtype, v, (guarded_side)side);
                describe(&b, "softmax");
                run_columns(&b, c, &run);
                for (size_t column = 0; column < COLUMNS; column++)
                    check_column(dtype, c, &run, column);
                check_special_columns(c, &run);
                if (!b.has_fma)
                    continue;
                if (is_first)
                    first = run;
                is_first = false;
                CHECK(memcmp(&run, &first, sizeof run) == 0, "case %zu: other bits than the first level's",
                      (size_t)(c - cases));
            }
    if (!is_first)
        hash_run(hash, &first);
}

/* ---- Two runs joined ---- */

enum { WIDTH = 7, NOTHING_FIRST = 0, NOTHING_SECOND = 1, NOTHING_AT_ALL = 2, FAR_APART = 3 };

typedef struct {
    double sums[WIDTH][COLUMNS], maximum[1][COLUMNS], sum[1][COLUMNS];
} partial;

static partial make_partial(mha_dtype dtype, bool is_second)
{
    partial made;
    for (size_t c = 0; c < COLUMNS; c++) {
        const bool is_empty = c == NOTHING_AT_ALL || c == (is_second ? NOTHING_SECOND : NOTHING_FIRST);
        const uint64_t seed = 30 + is_second;
        const double maximum = rounded(dtype, 10 * random_number(dtype, seed, c) + (c == FAR_APART) * 1e4 * is_second);
        made.maximum[0][c] = is_empty ? lowest_of(dtype) : maximum;
        made.sum[0][c] = is_empty ? 0 : rounded(dtype, 1 + fabs(random_number(dtype, seed + 10, c)));
        for (size_t d = 0; d < WIDTH; d++)
            made.sums[d][c] = is_empty ? 0 : random_number(dtype, seed + 20, d * COLUMNS + c);
    }
    return made;
}

static partial merge(const bench *b, partial a, partial with)
{
    for (size_t first = 0; first < COLUMNS; first += b->P) {
        void *panel[6];
        partial *const parts[2] = {&a, &with};
        for (size_t i = 0; i < 2; i++) {
            const size_t widths[3] = {WIDTH, 1, 1};
            double(*const numbers[3])[COLUMNS] = {parts[i]->sums, parts[i]->maximum, parts[i]->sum};
            for (size_t j = 0; j < 3; j++)
                panel[3 * i + j] = panel_of(b, 3 * i + j, widths[j], numbers[j], first);
        }
        b->k->softmax_merge(panel[0], panel[1], panel[2], panel[3], panel[4], panel[5], WIDTH, b->vectors);
        read_panel(b, panel[0], WIDTH, a.sums, first);
        read_panel(b, panel[1], 1, a.maximum, first);
        read_panel(b, panel[2], 1, a.sum, first);
        for (size_t slot = 0; slot < 6; slot++)
            CHECK(guarded_intact(slot), "wrote beside buffer %zu", slot);
    }
    return a;
}

/* x exp(d) + x2 exp(d2), each exp off as near_exp() allows. */
static void check_joined(mha_dtype dtype, double got, double x, double d, double x2, double d2)
{
    const double a = x * exp(d), b = x2 * exp(d2);
    const double bound = eps_of(dtype) * ((4 + fabs(d)) * fabs(a) + (4 + fabs(d2)) * fabs(b)) + 4 * smallest_of(dtype);
    CHECK(fabs(got - (a + b)) <= bound, "%a instead of %a", got, a + b);
}

static void check_merged(mha_dtype dtype, const partial *got, const partial *a, const partial *b)
{
    for (size_t c = 0; c < COLUMNS; c++) {
        const double maximum = fmax(a->maximum[0][c], b->maximum[0][c]);
        const double d_a = fmax(a->maximum[0][c] - maximum, -2000), d_b = fmax(b->maximum[0][c] - maximum, -2000);
        CHECK_SAME(got->maximum[0][c], maximum, c, 0);
        check_joined(dtype, got->sum[0][c], a->sum[0][c], d_a, b->sum[0][c], d_b);
        for (size_t d = 0; d < WIDTH; d++) {
            check_joined(dtype, got->sums[d][c], a->sums[d][c], d_a, b->sums[d][c], d_b);
            if (c == NOTHING_FIRST || c == NOTHING_SECOND)
                CHECK_SAME(got->sums[d][c], (c == NOTHING_FIRST ? b : a)->sums[d][c], c, d);
        }
    }
}

static void test_merge(mha_dtype dtype, uint64_t *hash)
{
    const partial a = make_partial(dtype, false), b = make_partial(dtype, true);
    partial first;
    bool is_first = true;
    for (size_t i = 0; mha_cpu_supported(i); i++)
        for (size_t v = 1; v <= mha_cpu_kernels_named(mha_cpu_supported(i), dtype)->vectors; v++) {
            const bench at = make_bench(mha_cpu_supported(i), dtype, v, (guarded_side)(v % 2));
            describe(&at, "softmax_merge");
            const partial got = merge(&at, a, b);
            check_merged(dtype, &got, &a, &b);
            if (at.has_fma && is_first)
                first = got;
            is_first &= !at.has_fma;
            CHECK(!at.has_fma || memcmp(&got, &first, sizeof got) == 0, "other bits than the first level's");
        }
    for (size_t i = 0; !is_first && i < sizeof first / sizeof(double); i++)
        hash_number(hash, ((const double *)(const void *)&first)[i]);
}

/* ---- NaN and infinity ---- */

/* The sum after two blocks of 20 finite scores, one of which is replaced. */
static double sum_with(const bench *b, size_t lane, size_t at, double score, double *p)
{
    void *maximum = buffer(b, 1, b->P), *sum = buffer(b, 2, b->P), *factor = buffer(b, 3, b->P);
    b->k->softmax_begin(maximum, sum, b->vectors);
    for (size_t block = 0; block < 2; block++) {
        void *scores = random_buffer(b, 0, 20 * b->P, block);
        if (at / 20 == block)
            put(b->dtype, scores, (ptrdiff_t)(at % 20 * b->P + lane), score);
        b->k->softmax_step(scores, 20, b->vectors, scores, maximum, sum, factor);
        if (at / 20 == block)
            *p = get(b->dtype, scores, (ptrdiff_t)(at % 20 * b->P + lane));
    }
    for (size_t other = 0; other < b->P; other++)
        CHECK(other == lane || isfinite(get(b->dtype, sum, (ptrdiff_t)other)), "NaN reached lane %zu from %zu", other,
              lane);
    return get(b->dtype, sum, (ptrdiff_t)lane);
}

static void test_nan_and_infinity(const bench *b)
{
    describe(b, "softmax of NaN and infinity");
    for (size_t lane = 0; lane < b->P; lane++)
        for (size_t at = 0; at < 40; at++) {
            double p = 0;
            CHECK(isnan(sum_with(b, lane, at, NAN, &p)) && isnan(p), "NaN at key %zu is lost", at);
            CHECK(isnan(sum_with(b, lane, at, INFINITY, &p)) && isnan(p), "inf at key %zu: p is %a", at, p);
            CHECK(isfinite(sum_with(b, lane, at, -INFINITY, &p)) && p == 0, "-inf at key %zu: p is %a", at, p);
            CHECK(isfinite(sum_with(b, lane, at, lowest_of(b->dtype), &p)) && p == 0, "min at key %zu: %a", at, p);
        }
}

int main(void)
{
    for (int dtype = 0; dtype < 2; dtype++) {
        uint64_t hash = HASH_OF_NOTHING;
        for (size_t i = 0; i < CASES; i++)
            test_case((mha_dtype)dtype, &cases[i], &hash);
        test_merge((mha_dtype)dtype, &hash);
        printf("hash softmax %s %016llx\n", dtype_name((mha_dtype)dtype), (unsigned long long)hash);
    }
    on_every_bench(test_nan_and_infinity);
    return check_report("test_softmax");
}
