/* SPDX-License-Identifier: Apache-2.0
 *
 * check.h - CHECK(condition, format, ...): says what failed, for which case, and goes on.
 *
 * Owns: the counts of one test program, and the words that describe the case it is at.
 */
#ifndef MHA_TESTS_CHECK_H
#define MHA_TESTS_CHECK_H

#include <stdio.h>

enum { MAX_SHOWN = 20 };

static char check_case[256]; /* set by DESCRIBE, shown with every failure */
static unsigned long check_count, check_failures;

#define DESCRIBE(...) ((void)snprintf(check_case, sizeof check_case, __VA_ARGS__))

#define CHECK(condition, ...) \
    do { \
        check_count++; \
        if (!(condition) && ++check_failures <= MAX_SHOWN) { \
            fprintf(stderr, "%s:%d: failed: %s\n    case: %s\n    ", __FILE__, __LINE__, #condition, check_case); \
            fprintf(stderr, __VA_ARGS__); \
            fputc('\n', stderr); \
        } \
    } while (0)

/* The program's last words; returns its exit status. */
static inline int check_report(const char *program)
{
    printf("%s: %lu checks, %lu failures\n", program, check_count, check_failures);
    return check_failures > 0;
}

#endif
