/* SPDX-License-Identifier: Apache-2.0
 *
 * limits.c - how long the kernels of a forward pass take by themselves.
 *
 * The pass runs on kernels that write down what they are asked for, and how long it took. Then each kind of call is
 * made again and again, in memory of its own, which stays in the caches nearest to the core: no pass over the same
 * kernels can take less than the sum of these times. Compiled with -Wl,--wrap=mha_cpu_kernels, so that the core gets
 * those kernels, and called by limits.py with the numbers of a described_call.
 *
 * Prints a line for each kind of call: kernel, sizes, calls, nanoseconds of one alone, and of one in the pass.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "calls.h"
#include "cpu.h"
#include "stopwatch.h"

enum { SIZES = 11, OPERANDS = 6, MAX_RECORDS = 1024, PASSES = 15 };

/* Calls of one kernel with the same sizes. */
typedef struct {
    const char *kernel;
    void (*run)(const void *); /* makes the call again, with `operand` where memory was */
    size_t size[SIZES];
    size_t calls;    /* in all passes */
    double seconds;  /* of this pass, */
    double in_pass;  /* and of the one whose kernels took least */
    void *operand[OPERANDS];
    mha_product product;
    mha_mask_block masks;
    mha_dropout_block dropout;
    mha_handful handful;
} record;

static record records[MAX_RECORDS];
static size_t record_count;
static const mha_kernels *real;

/* The record of such calls, with one more. */
static record *count(const char *kernel, void (*run)(const void *), const size_t size[SIZES])
{
    size_t i = 0;
    while (i < record_count && (records[i].run != run || memcmp(records[i].size, size, sizeof records[i].size) != 0))
        i++;
    if (i == MAX_RECORDS)
        abort();
    if (i == record_count) {
        records[record_count++] = (record){.kernel = kernel, .run = run};
        memcpy(records[i].size, size, sizeof records[i].size);
    }
    records[i].calls++;
    return &records[i];
}

/* What a call takes, two looks at the clock included. */
#define TIMED(record, call) \
    do { \
        const double begin = seconds_now(); \
        call; \
        (record)->seconds += seconds_now() - begin; \
    } while (0)

#define COUNT(kernel, ...) count(#kernel, again_##kernel, (const size_t[SIZES]){__VA_ARGS__})

static void *room(size_t n)
{
    return numbers(real->dtype, n);
}

/* A row of numbers that are all 1: factors and sums. */
static void *ones(size_t vectors)
{
    void *x = room(vectors * real->lanes);
    real->fill(x, vectors * real->lanes, 1);
    return x;
}

static size_t lanes(size_t vectors)
{
    return vectors * real->lanes;
}

/* ---- Each kernel: the call again, and the one that stands in the table in its place ---- */

static void again_product(const void *what)
{
    const record *r = what;
    real->product(&r->product);
}

static void product(const mha_product *p)
{
    const size_t P = lanes(p->vectors), width = P * (1 + p->more_panels), a_row = (size_t)p->a_row;
    const size_t a_k = (size_t)p->a_k, panel = p->more_panels ? p->b_panel_bytes / real->size : 0;
    const bool in_place = p->addend == p->c;
    record *r = COUNT(product, p->rows, p->depth, p->vectors, a_row, a_k, p->b_k, p->addend ? p->addend_row : SIZE_MAX,
                      p->c_row, (size_t)in_place + (p->factor ? 2 : 0), p->more_panels, panel);
    if (r->calls == 1 && p->rows > 0) {
        r->product = *p;
        r->product.prefetch = NULL;
        r->product.a = room((p->rows - 1) * a_row + p->depth * a_k + P);
        r->product.b = room(p->more_panels * panel + p->depth * p->b_k + P);
        r->product.c = room((p->rows - 1) * p->c_row + width);
        if (p->addend)
            r->product.addend = in_place ? r->product.c : room((p->rows - 1) * p->addend_row + width);
        if (p->factor)
            r->product.factor = ones(p->vectors * (1 + p->more_panels));
    }
    TIMED(r, real->product(p));
}

static void again_pack_panel(const void *what)
{
    const record *r = what;
    real->pack_panel(r->operand[0], r->size[0], r->size[1], r->size[2], 0.5, r->operand[1], r->size[3]);
}

static void pack_panel(const void *rows, size_t row_stride, size_t used, size_t width, double scale, void *panel,
                       size_t vectors)
{
    record *r = COUNT(pack_panel, row_stride, used, width, vectors);
    if (r->calls == 1) {
        r->operand[0] = room(used * row_stride + width);
        r->operand[1] = room(width * lanes(vectors));
    }
    TIMED(r, real->pack_panel(rows, row_stride, used, width, scale, panel, vectors));
}

static void again_unpack_panel(const void *what)
{
    const record *r = what;
    real->unpack_panel(r->operand[0], r->size[0], r->operand[1], r->size[1], r->size[2], r->operand[2], r->size[3]);
}

static void unpack_panel(const void *panel, size_t vectors, const void *factor, size_t used, size_t width, void *rows,
                         size_t row_stride)
{
    record *r = COUNT(unpack_panel, vectors, used, width, row_stride);
    if (r->calls == 1) {
        r->operand[0] = room(width * lanes(vectors));
        r->operand[1] = ones(vectors);
        r->operand[2] = room(used * row_stride + width);
    }
    TIMED(r, real->unpack_panel(panel, vectors, factor, used, width, rows, row_stride));
}

static void again_read_masks(const void *what)
{
    const record *r = what;
    real->read_masks(r->operand[0], r->size[0], r->size[1], r->size[2], &r->masks);
}

/* Reads the masks of the first such block again. */
static mha_visible read_masks(void *bias, size_t keys, size_t vectors, size_t used, const mha_mask_block *masks)
{
    const double begin = seconds_now();
    const mha_visible visible = real->read_masks(bias, keys, vectors, used, masks);
    const double seconds = seconds_now() - begin;
    record *r = COUNT(read_masks, keys, vectors, used, masks->attn_kind, masks->padding_kind, masks->is_causal,
                      masks->index != NULL, visible.keys, visible.is_biased);
    r->seconds += seconds;
    if (r->calls == 1) {
        r->operand[0] = room(keys * lanes(vectors));
        r->masks = *masks;
    }
    return visible;
}

static void again_softmax_begin(const void *what)
{
    const record *r = what;
    real->softmax_begin(r->operand[0], r->operand[1], r->size[0]);
}

static void softmax_begin(void *maximum, void *sum, size_t vectors)
{
    record *r = COUNT(softmax_begin, vectors);
    if (r->calls == 1) {
        r->operand[0] = ones(vectors);
        r->operand[1] = ones(vectors);
    }
    TIMED(r, real->softmax_begin(maximum, sum, vectors));
}

static void again_softmax_step(const void *what)
{
    const record *r = what;
    real->softmax_step(r->operand[0], r->size[0], r->size[1], r->operand[1], r->operand[2], r->operand[3],
                       r->operand[4]);
}

/* In place, scores become what the step before made of them, numbers in [0, 1]: no step is slower than another. */
static void softmax_step(const void *scores, size_t keys, size_t vectors, void *exps, void *maximum, void *sum,
                         void *factor)
{
    record *r = COUNT(softmax_step, keys, vectors, scores == exps);
    if (r->calls == 1) {
        r->operand[0] = room(keys * lanes(vectors));
        r->operand[1] = scores == exps ? r->operand[0] : room(keys * lanes(vectors));
        for (size_t i = 2; i < 5; i++)
            r->operand[i] = ones(vectors);
    }
    TIMED(r, real->softmax_step(scores, keys, vectors, exps, maximum, sum, factor));
}

static void again_softmax_merge(const void *what)
{
    const record *r = what;
    real->softmax_merge(r->operand[0], r->operand[1], r->operand[2], r->operand[3], r->operand[4], r->operand[5],
                        r->size[0], r->size[1]);
}

static void softmax_merge(void *sums, void *maximum, void *sum, const void *sums_2, const void *maximum_2,
                          const void *sum_2, size_t width, size_t vectors)
{
    record *r = COUNT(softmax_merge, width, vectors);
    for (size_t i = 0; r->calls == 1 && i < 6; i++)
        r->operand[i] = i % 3 == 0 ? room(width * lanes(vectors)) : ones(vectors);
    TIMED(r, real->softmax_merge(sums, maximum, sum, sums_2, maximum_2, sum_2, width, vectors));
}

static void again_softmax_end(const void *what)
{
    const record *r = what;
    real->softmax_end(r->operand[0], r->operand[1], r->size[0], MHA_EMPTY_ROW_ZERO);
}

static void softmax_end(void *sum, void *inverse, size_t vectors, mha_empty_row empty_row)
{
    record *r = COUNT(softmax_end, vectors);
    if (r->calls == 1) {
        r->operand[0] = ones(vectors);
        r->operand[1] = ones(vectors);
    }
    TIMED(r, real->softmax_end(sum, inverse, vectors, empty_row));
}

static void again_softmax_probabilities(const void *what)
{
    const record *r = what;
    real->softmax_probabilities(r->operand[0], r->size[0], r->size[1], r->operand[1], r->operand[2]);
}

static void softmax_probabilities(void *scores, size_t keys, size_t vectors, const void *maximum, const void *sum)
{
    record *r = COUNT(softmax_probabilities, keys, vectors);
    if (r->calls == 1) {
        r->operand[0] = room(keys * lanes(vectors));
        r->operand[1] = ones(vectors);
        r->operand[2] = ones(vectors);
    }
    TIMED(r, real->softmax_probabilities(scores, keys, vectors, maximum, sum));
}

static void again_add(const void *what)
{
    const record *r = what;
    real->add(r->operand[0], r->operand[0], r->operand[1], r->size[0]);
}

static void add(void *sum, const void *a, const void *b, size_t n)
{
    record *r = COUNT(add, n);
    if (r->calls == 1) {
        r->operand[0] = room(n);
        r->operand[1] = room(n);
    }
    TIMED(r, real->add(sum, a, b, n));
}

static void again_fill(const void *what)
{
    const record *r = what;
    real->fill(r->operand[0], r->size[0], 1);
}

static void fill(void *x, size_t n, double value)
{
    record *r = COUNT(fill, n);
    if (r->calls == 1)
        r->operand[0] = room(n);
    TIMED(r, real->fill(x, n, value));
}

static void again_is_finite(const void *what)
{
    const record *r = what;
    real->is_finite(r->operand[0], r->size[0]);
}

static bool is_finite(const void *x, size_t n)
{
    record *r = COUNT(is_finite, n);
    if (r->calls == 1)
        r->operand[0] = room(n);
    bool answer;
    TIMED(r, answer = real->is_finite(x, n));
    return answer;
}

static void again_dropout(const void *what)
{
    const record *r = what;
    real->dropout(r->operand[0], r->size[0], r->size[1], r->size[2], &r->dropout);
}

static void dropout(void *probabilities, size_t keys, size_t vectors, size_t used, const mha_dropout_block *block)
{
    record *r = COUNT(dropout, keys, vectors, used);
    if (r->calls == 1) {
        r->operand[0] = room(keys * lanes(vectors));
        r->dropout = *block;
    }
    TIMED(r, real->dropout(probabilities, keys, vectors, used, block));
}

static void again_attend_handful(const void *what)
{
    const record *r = what;
    real->attend_handful(&r->handful);
}

static void attend_handful(const mha_handful *h)
{
    const size_t q_row = (size_t)h->q_row, k_row = (size_t)h->k_row, v_row = (size_t)h->v_row;
    record *r = COUNT(attend_handful, h->queries, h->keys, h->D, h->Dv, q_row, k_row, v_row, (size_t)h->context_row);
    if (r->calls == 1) {
        r->handful = *h;
        r->handful.q = room(h->queries * q_row + h->D);
        r->handful.k = room(h->keys * k_row + h->D);
        r->handful.v = room(h->keys * v_row + h->Dv);
        r->handful.context = room(h->queries * (size_t)h->context_row + h->Dv);
    }
    TIMED(r, real->attend_handful(h));
}

/* ---- The pass ---- */

const mha_kernels *__real_mha_cpu_kernels(mha_dtype dtype);
const mha_kernels *__wrap_mha_cpu_kernels(mha_dtype dtype);

const mha_kernels *__wrap_mha_cpu_kernels(mha_dtype dtype)
{
    static mha_kernels recording;
    real = __real_mha_cpu_kernels(dtype);
    recording = (mha_kernels){
        .name = real->name, .dtype = real->dtype, .size = real->size, .lanes = real->lanes, .vectors = real->vectors,
        .product = product, .pack_panel = pack_panel, .unpack_panel = unpack_panel, .read_masks = read_masks,
        .softmax_begin = softmax_begin, .softmax_step = softmax_step, .softmax_merge = softmax_merge,
        .softmax_end = softmax_end, .softmax_probabilities = softmax_probabilities, .add = add,
        .fill = fill, .is_finite = is_finite, .dropout = dropout,
        .attend_handful = attend_handful,
    };
    return &recording;
}

static described_call parse(char **words)
{
    size_t at[12];
    for (size_t i = 0; i < 12; i++)
        at[i] = strtoull(words[i], NULL, 10);
    described_call c = {
        .N = at[0], .L = at[1], .S = at[2], .E = at[3], .Ek = at[4], .Ev = at[5], .H = at[6], .Hkv = at[7],
        .dtype = (mha_dtype)at[8], .is_causal = at[9] != 0, .wanted = (mha_wanted)at[10],
        .attn = at[11] == 1 ? MHA_MASK_FLOAT32 : at[11] == 2 ? MHA_MASK_HIDE : MHA_MASK_NONE, .per_head = at[11] == 2,
    };
    for (size_t n = 0; n < c.N && n < MAX_ITEMS && words[12 + n]; n++)
        c.live[n] = strtoull(words[12 + n], NULL, 10);
    return c;
}

static void look_at_clock(const void *nothing)
{
    (void)nothing;
    seconds_now();
}

/* Keeps this pass's times if its kernels took less than those of the passes before: returns what they took. */
static double keep_least(double least)
{
    double seconds = 0;
    for (size_t i = 0; i < record_count; i++)
        seconds += records[i].seconds;
    for (size_t i = 0; i < record_count; i++) {
        if (seconds < least)
            records[i].in_pass = records[i].seconds;
        records[i].seconds = 0;
    }
    return seconds < least ? seconds : least;
}

int main(int words, char **word)
{
    const char *reason = NULL;
    if (words < 13 || !mha_cpu_init(&reason)) {
        fprintf(stderr, "%s\n", reason ? reason : "N L S E Ek Ev H Hkv dtype causal weights mask [live ...]");
        return 1;
    }
    const described_call c = parse(word + 1);
    const prepared_call prepared = prepare_call(&c);
    record_count = 0; /* packing the weights is none of the pass */
    double least = INFINITY;
    for (size_t pass = 0; pass < PASSES; pass++) {
        if (mha_forward(prepared.layer, &prepared.call) != MHA_OK)
            return 1;
        least = keep_least(least);
    }
    const double look = best_seconds(look_at_clock, NULL);
    for (size_t i = 0; i < record_count; i++) {
        const record *r = &records[i];
        const size_t calls = r->calls / PASSES;
        printf("%s\t", r->kernel);
        for (size_t s = 0; s < SIZES; s++)
            printf("%zd ", (ptrdiff_t)r->size[s]);
        printf("\t%zu\t%.2f\t%.2f\n", calls, 1e9 * best_seconds(r->run, r),
               1e9 * (r->in_pass / (double)calls - look));
    }
    return 0;
}
