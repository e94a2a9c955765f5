/* SPDX-License-Identifier: Apache-2.0
 *
 * stopwatch.c - the clock, and rounds of runs.
 */
#include "stopwatch.h"

#include <stddef.h>
#include <time.h>

enum { ROUNDS = 15 };

static const double round_seconds = 0.003;

double seconds_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double best_seconds(void (*run)(const void *), const void *what)
{
    double best = 1e9;
    size_t calls = 1;
    for (int round = 0; round < ROUNDS; round++) {
        const double begin = seconds_now();
        for (size_t i = 0; i < calls; i++)
            run(what);
        const double elapsed = seconds_now() - begin;
        if (elapsed < round_seconds) { /* too short to count: only now do we know how many calls fill a round */
            calls = (size_t)((double)calls * (elapsed > 0 ? 1.2 * round_seconds / elapsed + 1 : 2));
            round -= calls < 1u << 24;
            continue;
        }
        if (elapsed / (double)calls < best)
            best = elapsed / (double)calls;
    }
    return best;
}
