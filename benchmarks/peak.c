/* SPDX-License-Identifier: Apache-2.0
 *
 * peak.c - how many floating-point operations a second the fused multiply-add units of this machine can do.
 *
 * Compiled by peak.py once per instruction set; VECTOR_BYTES is the width of its registers. Enough independent chains
 * to hide the latency of every core known to us, few enough to stay in registers.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#if defined(__AVX512F__) || defined(__aarch64__)
#define CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) X(17) \
    X(18) X(19)
#else
#define CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#endif
#define COUNT(i) +1
enum { CHAIN_COUNT = 0 CHAINS(COUNT), STEPS = 20000, MAX_THREADS = 256 };

typedef struct {
    int is_double, threads;
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

/* Runs for so many seconds; operations a second. */
static double rate(const job *j, double seconds)
{
    const double lanes = VECTOR_BYTES / (double)(j->is_double ? sizeof(double) : sizeof(float));
    const double begin = now();
    double runs = 0, elapsed;
    do {
        (j->is_double ? run_double : run_float)();
        runs++;
        elapsed = now() - begin;
    } while (elapsed < seconds);
    return runs * STEPS * CHAIN_COUNT * lanes * 2 / elapsed;
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

/* Operations per second of all threads together, 0 if a thread cannot be started. */
double peak_rate(int threads, double seconds, int is_double)
{
    pthread_t id[MAX_THREADS];
    job jobs[MAX_THREADS];
    atomic_int arrived = 0;
    int started = 1;
    if (threads > MAX_THREADS)
        threads = MAX_THREADS;
    for (int i = 0; i < threads; i++)
        jobs[i] = (job){is_double, threads, seconds, 0, &arrived};
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
