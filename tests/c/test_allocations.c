/* SPDX-License-Identifier: Apache-2.0
 *
 * test_allocations.c - what happens when memory runs out, at any moment: MHA_NO_MEMORY, nothing leaked, nothing broken.
 *
 * To be linked with -Wl,--wrap=malloc,--wrap=calloc,--wrap=aligned_alloc,--wrap=free, so that the allocations of
 * the core, and of this file, come here first.
 *
 * Also: sizes that no memory could hold, and a call that is asked to stop, at any moment.
 */
#include "layers.h"
#include "spare.h"

/* ---- Allocations, counted and refused ---- */

static size_t allocations_left = SIZE_MAX; /* before one fails, and all after it */
static long live;

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_aligned_alloc(size_t alignment, size_t bytes);
void __real_free(void *old);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_aligned_alloc(size_t alignment, size_t bytes);
void __wrap_free(void *old);

static bool may_allocate(void)
{
    if (allocations_left == 0)
        return false;
    allocations_left--;
    return true;
}

/* What is in use; the workspace that a call leaves for the next one is not, and the next one is to start afresh. */
static long in_use(void)
{
    mha_free_spare();
    return live;
}

static void *counted(void *made)
{
    live += made != NULL;
    return made;
}

void *__wrap_malloc(size_t bytes)
{
    return may_allocate() ? counted(__real_malloc(bytes)) : NULL;
}

void *__wrap_calloc(size_t count, size_t bytes)
{
    return may_allocate() ? counted(__real_calloc(count, bytes)) : NULL;
}

/* Memory that was freed and is given again may still hold the right answer. Not here: every number becomes NaN. */
void *__wrap_aligned_alloc(size_t alignment, size_t bytes)
{
    void *made = may_allocate() ? counted(__real_aligned_alloc(alignment, bytes)) : NULL;
    if (made && bytes < GUARDED_BYTES)
        memset(made, CANARY, bytes);
    return made;
}

void __wrap_free(void *old)
{
    live -= old != NULL;
    __real_free(old);
}

/* ---- Asked to stop ---- */

typedef struct {
    size_t asked, patience; /* questions that are answered with no */
} questions;

static bool is_impatient(void *context)
{
    questions *q = context;
    return ++q->asked > q->patience;
}

/* Stopped at the first question, the second, ... until the call gets through. */
static void expect_stops(const problem *p, const mha_layer *layer, mha_call c, long before)
{
    mha_status status = MHA_STOPPED;
    for (size_t patience = 0; patience < 10000 && status != MHA_OK; patience += 1 + patience / 8) {
        questions q = {.patience = patience};
        c.stop = (mha_stop){.should_stop = is_impatient, .context = &q};
        DESCRIBE("'%s', %zu threads, stopped after %zu questions", p->name, c.threads, patience);
        status = mha_forward(layer, &c);
        CHECK(status == (q.asked > patience ? MHA_STOPPED : MHA_OK), "asked %zu times, status %d", q.asked,
              (int)status);
        CHECK(in_use() == before, "%ld allocations leaked", live - before);
    }
    CHECK(status == MHA_OK, "never got through");
}

/* ---- The n-th allocation fails ---- */

#define RAGGED {.H = 6, .Hkv = 2, .D = 5, .Dv = 7, .E = 11, .Ek = 13, .Ev = 3, .Eo = 9}

static const problem problems[] = {
    {.name = "everything", .N = 3, .L = 70, .S = 131, .w = RAGGED, .has_bias_kv = true, .add_zero_attn = true,
     .has_bias = true, .padding = MHA_MASK_FLOAT32, .attn = MHA_MASK_FLOAT64, .attn_per_head = true},
    {.name = "few queries", .N = 2, .L = 1, .S = 1100, .w = RAGGED, .padding = MHA_MASK_HIDE},
    {.name = "no masks", .N = 1, .L = 3, .S = 4, .w = RAGGED},
};
enum { PROBLEMS = sizeof problems / sizeof *problems, MAX_ALLOCATIONS = 1000 };

/* Weights, made with ever more memory until they can be. */
static mha_layer *make_layer(const problem *p, const parameters *given)
{
    mha_layer *layer = NULL;
    const long before = in_use();
    mha_status status = MHA_NO_MEMORY;
    for (size_t n = 0; n < MAX_ALLOCATIONS && status != MHA_OK; n++) {
        DESCRIBE("'%s', weights, %zu allocations", p->name, n);
        allocations_left = n;
        status = pack_parameters(p, given, &layer);
        allocations_left = SIZE_MAX;
        CHECK(status == MHA_OK || status == MHA_NO_MEMORY, "status %d", (int)status);
        CHECK((layer != NULL) == (status == MHA_OK), "status %d and weights %p", (int)status, (void *)layer);
        CHECK(status == MHA_OK || in_use() == before, "%ld allocations leaked", live - before);
        CHECK(n > 0 || status == MHA_NO_MEMORY, "needs no memory");
    }
    CHECK(status == MHA_OK, "never enough memory");
    return layer;
}

/* The same for a call; what it gives in the end is what it gives at once. */
static void test_problem(const problem *p, mha_dtype dtype, mha_wanted wanted)
{
    parameters given = make_parameters(p, dtype);
    const long at_first = in_use();
    mha_layer *layer = make_layer(p, &given);
    const manner m = {.threads = 2, .wanted = wanted};
    const mha_call c = make_call(p, dtype, &m);
    const size_t bytes = p->N * p->L * p->w.Eo * mha_size_of(dtype);
    char *complete = malloc(bytes);
    CHECK(mha_forward(layer, &c) == MHA_OK, "no answer");
    memcpy(complete, c.output.data, bytes);
    const long before = in_use();
    mha_status status = MHA_NO_MEMORY;
    for (size_t n = 0; n < MAX_ALLOCATIONS && status != MHA_OK; n++) {
        DESCRIBE("'%s', %s, weights wanted %d, %zu allocations", p->name, dtype_name(dtype), (int)wanted, n);
        memset(c.output.data, CANARY, bytes);
        allocations_left = n;
        status = mha_forward(layer, &c);
        allocations_left = SIZE_MAX;
        CHECK(status == MHA_OK || status == MHA_NO_MEMORY, "status %d", (int)status);
        CHECK(in_use() == before, "%ld allocations leaked", live - before);
    }
    CHECK(status == MHA_OK && memcmp(complete, c.output.data, bytes) == 0, "status %d, or another answer", (int)status);
    free(complete);
    mha_layer_destroy(layer);
    CHECK(in_use() == at_first, "%ld allocations leaked", live - at_first);
    free_parameters(&given);
}

#define NARROW {.H = 2, .Hkv = 2, .D = 8, .Dv = 8, .E = 16, .Ek = 16, .Ev = 16, .Eo = 16}

static const struct {
    problem p;
    surroundings s;
} layers[] = {
    {{.name = "a layer", .N = 3, .L = 70, .S = 70, .w = NARROW, .is_self = true, .padding = MHA_MASK_HIDE},
     {.norm_first = true, .zeroes_padding = true, .has_network = true, .hidden = 40}},
    {{.name = "a layer of few queries", .N = 4, .L = 1, .S = 700, .w = NARROW, .padding = MHA_MASK_HIDE},
     {.has_network = true, .is_gated = true, .hidden = 40}},
    {{.name = "a layer in chunks", .N = 96, .L = 50, .S = 50, .w = NARROW, .is_self = true},
     {.has_network = true, .hidden = 40}},
    {{.name = "hidden features in parts", .N = 1, .L = 500, .S = 500, .w = NARROW, .is_self = true},
     {.norm_first = true, .has_network = true, .hidden = 9000}},
    {{.name = "a layer without a network", .N = 2, .L = 30, .S = 50, .w = NARROW}, {.has_norm_parameters = true}},
};
enum { BLOCK_PROBLEMS = sizeof layers / sizeof *layers };

/* The linear maps of a layer, made with ever more memory until they can be. */
static void make_block_at_last(const problem *p, const surroundings *s, mha_dtype dtype, made_block *made)
{
    const long before = in_use();
    mha_status status = MHA_NO_MEMORY;
    const size_t of_test = s->has_network ? 4 : 0; /* the test's own arrays */
    for (size_t n = of_test; n < MAX_ALLOCATIONS && status != MHA_OK; n++) {
        DESCRIBE("'%s', linear maps, %zu allocations", p->name, n);
        allocations_left = n + (s->has_norm_parameters ? 4 : 0);
        status = make_block(p, s, dtype, made);
        allocations_left = SIZE_MAX;
        CHECK(status == MHA_OK || status == MHA_NO_MEMORY, "status %d", (int)status);
        CHECK(n > 4 || !s->has_network || status == MHA_NO_MEMORY, "needs no memory");
        if (status != MHA_OK)
            free_block(made);
        CHECK(status == MHA_OK || in_use() == before, "%ld allocations leaked", live - before);
    }
    CHECK(status == MHA_OK, "never enough memory");
}

/* A whole layer: the same, and stopped at any moment. */
static void test_layer(const problem *p, const surroundings *s, size_t threads)
{
    parameters given = make_parameters(p, MHA_FLOAT32);
    const long at_first = in_use();
    mha_layer *layer = make_layer(p, &given);
    made_block made;
    make_block_at_last(p, s, MHA_FLOAT32, &made);
    const manner m = {.threads = threads};
    mha_call c = make_call(p, MHA_FLOAT32, &m);
    const size_t bytes = p->N * p->L * p->w.Eo * mha_size_of(MHA_FLOAT32);
    char *complete = malloc(bytes);
    c.block = &made.block;
    CHECK(compute_in_steps(layer, &c, p->w.E, s->hidden, MHA_FLOAT32, complete) == MHA_OK, "no steps");
    const long before = in_use();
    mha_status status = MHA_NO_MEMORY;
    for (size_t n = 0; n < MAX_ALLOCATIONS && status != MHA_OK; n++) {
        DESCRIBE("'%s', %zu threads, %zu allocations", p->name, threads, n);
        allocations_left = n;
        status = mha_forward(layer, &c);
        allocations_left = SIZE_MAX;
        CHECK(status == (n < 2 ? MHA_NO_MEMORY : status) && (status == MHA_OK || status == MHA_NO_MEMORY), "status %d",
              (int)status);
        CHECK(in_use() == before, "%ld allocations leaked", live - before);
    }
    CHECK(status == MHA_OK && memcmp(complete, c.output.data, bytes) == 0, "status %d, or another answer", (int)status);
    expect_stops(p, layer, c, before);
    free(complete);
    free_block(&made);
    mha_layer_destroy(layer);
    CHECK(in_use() == at_first, "%ld allocations leaked", live - at_first);
    free_parameters(&given);
}

/* The same for parts of the pass, and for attention without projections. */
static void test_parts(void)
{
    enum { WIDTH = 6, N = 2, LENGTH = 300, OUTPUT_BYTES = 8 * N * LENGTH * WIDTH };
    const problem p = {.name = "parts", .N = N, .L = 1, .S = LENGTH, .w = {.H = 2, .Hkv = 2, .D = 3, .Dv = 3,
                       .E = WIDTH, .Ek = WIDTH, .Ev = WIDTH, .Eo = WIDTH}, .padding = MHA_MASK_HIDE};
    const ptrdiff_t none[] = {0};
    parameters given = make_parameters(&p, MHA_FLOAT32);
    mha_layer *layer = make_layer(&p, &given);
    const mha_call c = make_call(&p, MHA_FLOAT32, &(manner){.threads = 2});
    const mha_heads heads = {c.key, none, 1};
    char *y = guarded_buffer(OUTPUT + 2, OUTPUT_BYTES, AT_END);
    const mha_heads output = {mha_contiguous_rows(y, MHA_FLOAT32, 1, LENGTH, WIDTH), none, 1};
    bool is_few[N];
    mha_input_projection input = {layer, MHA_KEY, N, LENGTH, c.key, output.rows, 2, {0}};
    mha_sdpa_call sdpa = {.dtype = MHA_FLOAT32, .axes = 1, .length = &(size_t){1}, .L = LENGTH, .S = LENGTH, .D = WIDTH,
                          .Dv = WIDTH, .query = heads, .key = heads, .value = heads, .output = output, .threads = 2};
    const long before = in_use();
    for (size_t part = 0; part < 3; part++) {
        mha_status status = MHA_NO_MEMORY;
        for (size_t n = 0; n < MAX_ALLOCATIONS && status != MHA_OK; n++) {
            DESCRIBE("part %zu, %zu allocations", part, n);
            allocations_left = n;
            status = part == 0 ? mha_project_input(&input) : part == 1 ? mha_choose_paths(layer, &c, is_few)
                                                                       : mha_sdpa(&sdpa);
            allocations_left = SIZE_MAX;
            CHECK(status == (n ? MHA_OK : MHA_NO_MEMORY) || (part == 2 && n == 1), "status %d", (int)status);
            CHECK(in_use() == before, "%ld allocations leaked", live - before);
        }
    }
    DESCRIBE("parts that are too large");
    input.N = sdpa.axes = 2;
    input.length = SIZE_MAX / 2 + 1;
    sdpa.length = (const size_t[]){SIZE_MAX / 2 + 1, 2};
    CHECK(mha_project_input(&input) == MHA_TOO_LARGE, "N * length overflows");
    CHECK(mha_sdpa(&sdpa) == MHA_TOO_LARGE, "the product of the axes overflows");
    CHECK(in_use() == before, "%ld allocations leaked", live - before);
    mha_layer_destroy(layer);
    free_parameters(&given);
}

/* A plan remembers every kind of overflow, wherever it comes; the empty one is memory, too. */
static void test_layouts(void)
{
    static const size_t sizes[][3] = {{SIZE_MAX, 2, 1}, {SIZE_MAX / 2, 2, 4}, {SIZE_MAX, 1, 1}, {SIZE_MAX / 2, 1, 1}};
    const long before = in_use();
    char *block;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        mha_plan plan = {0};
        DESCRIBE("%zu * %zu * %zu bytes", sizes[i][0], sizes[i][1], sizes[i][2]);
        mha_reserve(&plan.layout, sizes[i][0], sizes[i][1], sizes[i][2]);
        mha_reserve(&plan.layout, 1, 1, 1);
        CHECK(mha_allocate(&plan, &block) == MHA_TOO_LARGE && !block, "allocated");
        CHECK(mha_take_workspace(&plan, &block) == MHA_TOO_LARGE && !block, "a workspace");
        mha_plan whole = {0};
        mha_reserve(&whole.layout, 1, plan.layout.bytes, 1);
        CHECK(mha_allocate(&whole, &block) == MHA_TOO_LARGE && !block, "allocated as a piece");
    }
    DESCRIBE("twice what fits once");
    mha_plan plan = {0};
    for (size_t i = 0; i < 3; i++)
        mha_reserve(&plan.layout, PTRDIFF_MAX / 3, 1, 1);
    CHECK(mha_allocate(&plan, &block) == MHA_TOO_LARGE && !block, "allocated");
    DESCRIBE("nothing");
    CHECK(mha_allocate(&(mha_plan){0}, &block) == MHA_OK && block, "no block");
    mha_release(block);
    CHECK(in_use() == before, "%ld allocations leaked", live - before);
}

/* AddressSanitizer allows the bytes of each piece, and forbids those that follow: also where other pieces were before,
 * and in the copies of a layout. */
static void test_red_zones(void)
{
#ifdef __SANITIZE_ADDRESS__
    enum { ROUNDS = 3, PIECES = 4, COPIES = 2 };
    char *block = mha_allocate_bytes(1 << 20);
    for (size_t round = 0; round < ROUNDS; round++) {
        mha_plan plan;
        mha_layout one = {0};
        char *piece[PIECES];
        const size_t bytes[PIECES] = {1 + 100 * round, 64, 1000 - 300 * round, 8};
        mha_begin_plan(&plan);
        for (size_t i = 0; i < PIECES; i++)
            mha_place(&plan, &piece[i], bytes[i], 1, 1);
        const size_t in_one = mha_reserve(&one, 1, 24, 1), first = mha_reserve_copies(&plan.layout, COPIES, &one);
        mha_set_pointers(&plan, block);
        for (size_t i = 0; i < PIECES + COPIES; i++) {
            char *begin = i < PIECES ? piece[i] : block + first + (i - PIECES) * one.bytes + in_one;
            const size_t size = i < PIECES ? bytes[i] : 24;
            DESCRIBE("round %zu, piece %zu", round, i);
            CHECK(!__asan_region_is_poisoned(begin, size), "the piece is forbidden");
            for (size_t beyond = 0; beyond < MHA_RED_ZONE; beyond++)
                CHECK(__asan_address_is_poisoned(begin + size + beyond), "byte %zu behind it is allowed", beyond);
        }
    }
    mha_release(block);
#endif
}

/* ---- Workspaces of callers that are at work at once ---- */

/* Each finds its own; one of those that are given back is kept, the others are freed. */
static void test_workspaces(void)
{
    enum { CALLERS = 3, BYTES = 1 << 20 };
    const mha_plan plan = {.layout = {.bytes = BYTES}};
    const long before = in_use();
    char *blocks[CALLERS];
    DESCRIBE("%d callers at once", CALLERS);
    for (size_t round = 0; round < 3; round++) {
        for (size_t i = 0; i < CALLERS; i++) {
            CHECK(mha_take_workspace(&plan, &blocks[i]) == MHA_OK, "no workspace");
            for (size_t j = 0; j < i; j++)
                CHECK(blocks[j] != blocks[i], "two callers have one workspace");
        }
        for (size_t i = 0; i < CALLERS; i++)
            mha_give_workspace(blocks[i]);
        CHECK(live == before + 1, "%ld workspaces left of %d", live - before, CALLERS);
    }
    CHECK(in_use() == before, "%ld allocations leaked", live - before);
}

/* ---- Too large, and stopped ---- */

static void expect_too_large(const char *what, const mha_layer *layer, mha_call c, size_t N, size_t L, size_t S)
{
    const long before = in_use();
    DESCRIBE("N %zu, L %zu, S %zu: %s", N, L, S, what);
    c.N = N;
    c.L = L;
    c.S = S;
    const mha_status status = mha_forward(layer, &c);
    CHECK(status == MHA_TOO_LARGE || status == MHA_NO_MEMORY, "status %d", (int)status);
    CHECK(in_use() == before, "%ld allocations leaked", live - before);
}

/* Arrays whose every stride is 0 can have any length. */
static void test_sizes(void)
{
    const problem p = {.name = "huge", .N = 1, .L = 1, .S = 1, .w = RAGGED};
    const size_t huge = SIZE_MAX / 4 + 1;
    parameters given = make_parameters(&p, MHA_FLOAT32);
    mha_layer *layer = make_layer(&p, &given);
    const manner m = {.threads = 1};
    mha_call c = make_call(&p, MHA_FLOAT32, &m);
    c.query.item = c.query.row = c.key.item = c.key.row = c.value.item = c.value.row = 0;
    expect_too_large("queries", layer, c, 1, huge, 1);
    expect_too_large("keys", layer, c, 1, 1, huge);
    expect_too_large("items", layer, c, huge, 1, 1);
    expect_too_large("N * L overflows", layer, c, 4, huge, 1);
    expect_too_large("N * S overflows", layer, c, 4, 1, huge);
    mha_layer_destroy(layer);
    free_parameters(&given);
}

static void stop_everywhere(const problem *p, size_t threads)
{
    parameters given = make_parameters(p, MHA_FLOAT32);
    mha_layer *layer = make_layer(p, &given);
    const manner m = {.threads = threads, .wanted = MHA_WANT_AVERAGES};
    expect_stops(p, layer, make_call(p, MHA_FLOAT32, &m), in_use());
    mha_layer_destroy(layer);
    free_parameters(&given);
}

/* The parts of a feed-forward network by themselves. */
static void stop_parts(size_t threads)
{
    enum { ROWS = 400, WIDTH = 150 };
    const problem p = {.name = "parts", .w = {.E = WIDTH}};
    const surroundings s = {.has_network = true, .hidden = WIDTH};
    made_block made;
    CHECK(make_block(&p, &s, MHA_FLOAT32, &made) == MHA_OK, "no linear maps");
    char *x = random_array(MHA_FLOAT32, ROWS * WIDTH, 1, 3), *y = malloc(ROWS * WIDTH * sizeof(float));
    const long before = in_use();
    for (size_t patience = 0; patience < 3; patience++) {
        questions q = {.patience = patience};
        const mha_stop stop = {.should_stop = is_impatient, .context = &q};
        const mha_linear_call linear = {.linear = made.linear1, .rows = ROWS, .x = x, .y = y, .threads = threads,
                                        .stop = stop};
        const mha_activation_call activation = {.dtype = MHA_FLOAT32, .rows = ROWS, .width = WIDTH, .x = x, .y = y,
                                                .threads = threads, .stop = stop};
        DESCRIBE("parts, %zu threads, stopped after %zu questions", threads, patience);
        for (int part = 0; part < 2; part++) {
            q.asked = 0;
            const mha_status status = part ? mha_apply_activation(&activation) : mha_apply_linear(&linear);
            CHECK(status == (q.asked > patience ? MHA_STOPPED : MHA_OK), "asked %zu times, status %d", q.asked,
                  (int)status);
            CHECK(q.asked > 0 || threads > 1, "never asked"); /* the others may be quicker than the caller */
        }
        CHECK(in_use() == before, "%ld allocations leaked", live - before);
    }
    free(x);
    free(y);
    free_block(&made);
}

static void test_stop(void)
{
    const problem ordinary = {.name = "ordinary", .N = 4, .L = 200, .S = 200, .w = RAGGED};
    const problem few_queries = {.name = "few queries", .N = 4, .L = 1, .S = 700, .w = {.H = 4, .Hkv = 4, .D = 16,
                                 .Dv = 16, .E = 64, .Ek = 64, .Ev = 64, .Eo = 8}};
    const problem chunks = {.name = "chunks of items", .N = 48, .L = 100, .S = 20, .w = RAGGED};
    for (size_t threads = 1; threads < 4; threads++) {
        stop_everywhere(&ordinary, threads);
        stop_everywhere(&chunks, threads);
        stop_everywhere(&few_queries, threads);
        stop_parts(threads);
    }
}

int main(void)
{
    if (!choose_kernels())
        return 2;
    for (size_t i = 0; i < PROBLEMS; i++)
        for (int dtype = 0; dtype < 2; dtype++)
            for (int wanted = 0; wanted < 3; wanted++)
                test_problem(&problems[i], (mha_dtype)dtype, (mha_wanted)wanted);
    for (size_t i = 0; i < BLOCK_PROBLEMS; i++)
        for (size_t threads = 1; threads < 4; threads++)
            test_layer(&layers[i].p, &layers[i].s, threads);
    test_parts();
    test_layouts();
    test_red_zones();
    test_workspaces();
    test_stop();
    test_sizes();
    return check_report("test_allocations");
}
