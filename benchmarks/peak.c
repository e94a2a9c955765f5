/* SPDX-License-Identifier: Apache-2.0
 *
 * peak.c - how many multiplications and additions a second the multiply-add units of this machine can do.
 *
 * Compiled by peak.py once per instruction set; VECTOR_BYTES is the width of its registers. Enough independent chains
 * to hide the latency of every core known to us, few enough to stay in registers.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
#define CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) X(17) \
    X(18) X(19)
#else
#define CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#endif
#define COUNT(i) +1
enum { CHAIN_COUNT = 0 CHAINS(COUNT), STEPS = 20000, MAX_THREADS = 256 };

typedef struct {
    int kind, threads;
    double seconds, rate;
    atomic_int *arrived; /* threads that run */
} job;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#define START(i) vector a##i = factor + (real)i;
#define STEP(i) a##i = a##i * factor + addend;
#define SUM(i) sum += a##i;

/* Chains that converge to 1, so that no step is slowed down by an extreme number. */
#define DEFINE_RUN(name, type) \
    static void name(void) \
    { \
        typedef type real; \
        typedef real vector __attribute__((vector_size(VECTOR_BYTES))); \
        volatile real half = (real)0.5; \
        const vector factor = (vector){0} + half, addend = factor; \
        vector sum = {0}; \
        CHAINS(START) \
        for (int step = 0; step < STEPS; step++) { \
            CHAINS(STEP) \
        } \
        CHAINS(SUM) \
        volatile vector result = sum; \
        (void)result; \
    }
DEFINE_RUN(run_float, float)
DEFINE_RUN(run_double, double)

/* A step of int8: products of int8 are added to int32 without a loss. On x86 without VNNI, the numbers are int16 when
 * they are multiplied. */
#if defined(__AVX512VNNI__)
typedef __m512i sums;
#define STEP_INT8(a, x) _mm512_dpbusd_epi32(a, x, x)
enum { INT8_PRODUCTS = 64 };
#elif defined(__AVX512BW__)
typedef __m512i sums;
#define STEP_INT8(a, x) _mm512_add_epi32(a, _mm512_madd_epi16(x, x))
enum { INT8_PRODUCTS = 32 };
#elif defined(__AVX2__)
typedef __m256i sums;
#define STEP_INT8(a, x) _mm256_add_epi32(a, _mm256_madd_epi16(x, x))
enum { INT8_PRODUCTS = 16 };
#elif defined(__SSE2__)
typedef __m128i sums;
#define STEP_INT8(a, x) _mm_add_epi32(a, _mm_madd_epi16(x, x))
enum { INT8_PRODUCTS = 8 };
#elif defined(__ARM_FEATURE_DOTPROD)
typedef int32x4_t sums;
#define STEP_INT8(a, x) vdotq_s32(a, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(x))
enum { INT8_PRODUCTS = 16 };
#elif defined(__aarch64__)
typedef int32x4_t sums; /* two products of numbers from -127 to 127 fit into int16 */
static inline sums step_int8(sums a, int8x16_t x)
{
    return vpadalq_s16(a, vmlal_high_s8(vmull_s8(vget_low_s8(x), vget_low_s8(x)), x, x));
}
#define STEP_INT8(a, x) step_int8(a, vreinterpretq_s8_s32(x))
enum { INT8_PRODUCTS = 16 };
#else
typedef uint32_t sums __attribute__((vector_size(VECTOR_BYTES)));
#define STEP_INT8(a, x) ((a) + (x) * (x))
enum { INT8_PRODUCTS = VECTOR_BYTES / 4 };
#endif

/* Makes the compiler forget what a vector holds. Otherwise it would multiply only once, and gcc would copy sums. */
#if defined(__SSE2__)
#define FORGET(vector) __asm__("" : "+v"(vector))
#elif defined(__aarch64__)
#define FORGET(vector) __asm__("" : "+w"(vector))
#else
#define FORGET(vector) __asm__("" : "+m"(vector))
#endif

typedef uint32_t words __attribute__((vector_size(sizeof(sums))));
#define START_NARROW(i) sums b##i = {0};
#define STEP_NARROW(i, step) \
    FORGET(factor); \
    b##i = step(b##i, factor); \
    FORGET(b##i);
#define SUM_NARROW(i) sum += (words)b##i;

/* `word`: some narrow numbers. */
#define DEFINE_NARROW_RUN(name, chain, word) \
    static void name(void) \
    { \
        sums factor = (sums)((words){0} + (word)); \
        words sum = {0}; \
        CHAINS(START_NARROW) \
        for (int step = 0; step < STEPS; step++) { \
            CHAINS(chain) \
        } \
        CHAINS(SUM_NARROW) \
        volatile words result = sum; \
        (void)result; \
    }

#define CHAIN_INT8(i) STEP_NARROW(i, STEP_INT8)
DEFINE_NARROW_RUN(run_int8, CHAIN_INT8, 0x00030003u)

/* Products of bfloat16 are added to float32. Without an instruction for that, float32 is multiplied. */
#if defined(__AVX512BF16__)
#define STEP_BF16(a, x) (sums)_mm512_dpbf16_ps((__m512)(a), (__m512bh)(x), (__m512bh)(x))
#define CHAIN_BF16(i) STEP_NARROW(i, STEP_BF16)
DEFINE_NARROW_RUN(run_bf16, CHAIN_BF16, 0x3f003f00u) /* 0.5 */
enum { BF16_PRODUCTS = VECTOR_BYTES / 2 };
#else
#define run_bf16 run_float
enum { BF16_PRODUCTS = VECTOR_BYTES / 4 };
#endif

/* By kind: what runs, and the products of a step. */
static const struct {
    void (*run)(void);
    double products;
} kinds[] = {
    {run_float, VECTOR_BYTES / 4.0}, {run_double, VECTOR_BYTES / 8.0},
    {run_int8, INT8_PRODUCTS}, {run_bf16, BF16_PRODUCTS},
};

/* Runs for so many seconds; operations a second. */
static double rate(const job *j, double seconds)
{
    const double begin = now();
    double runs = 0, elapsed;
    do {
        kinds[j->kind].run();
        runs++;
        elapsed = now() - begin;
    } while (elapsed < seconds);
    return runs * STEPS * CHAIN_COUNT * kinds[j->kind].products * 2 / elapsed;
}

/* A thread that has just been woken is slow for some milliseconds: only what comes after them counts. */
static void *measure(void *argument)
{
    job *j = argument;
    atomic_fetch_add(j->arrived, 1);
    while (atomic_load(j->arrived) < j->threads)
        ;
    rate(j, j->seconds / 2);
    j->rate = rate(j, j->seconds);
    return NULL;
}

/* Operations per second of all threads together, on float32 (kind 0), float64 (1), int8 (2) or bfloat16 (3). 0 if a
 * thread cannot be started. */
double peak_rate(int threads, double seconds, int kind)
{
    pthread_t id[MAX_THREADS];
    job jobs[MAX_THREADS];
    atomic_int arrived = 0;
    int started = 1;
    if (threads > MAX_THREADS)
        threads = MAX_THREADS;
    for (int i = 0; i < threads; i++)
        jobs[i] = (job){kind, threads, seconds, 0, &arrived};
    while (started < threads && pthread_create(&id[started], NULL, measure, &jobs[started]) == 0)
        started++;
    atomic_fetch_add(&arrived, threads - started); /* for those that never come */
    measure(&jobs[0]);
    double sum = jobs[0].rate;
    for (int i = 1; i < started; i++) {
        pthread_join(id[i], NULL);
        sum += jobs[i].rate;
    }
    return started == threads ? sum : 0;
}
