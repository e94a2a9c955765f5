/* SPDX-License-Identifier: Apache-2.0
 *
 * failing_malloc.c - for LD_PRELOAD: the n-th allocation of a process, or its threads, cannot be had.
 *
 * Assumes glibc, whose own names for these functions stay reachable.
 */
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t count, size_t bytes);
void *__libc_realloc(void *old, size_t bytes);
void *__libc_memalign(size_t alignment, size_t bytes);

static atomic_long until_failure; /* 0: none is to come */
static atomic_long failures;
static atomic_bool threads_fail;

/* The n-th allocation from now on fails, once; 0: none. Returns how many failed so far. */
__attribute__((visibility("default"))) long fail_at(long n);
__attribute__((visibility("default"))) void fail_threads(int whether);

long fail_at(long n)
{
    atomic_store(&until_failure, n);
    return atomic_load(&failures);
}

void fail_threads(int whether)
{
    atomic_store(&threads_fail, whether != 0);
}

static bool fails(void)
{
    if (atomic_load(&until_failure) <= 0 || atomic_fetch_sub(&until_failure, 1) != 1)
        return false;
    atomic_fetch_add(&failures, 1);
    errno = ENOMEM;
    return true;
}

void *malloc(size_t bytes)
{
    return fails() ? NULL : __libc_malloc(bytes);
}

void *calloc(size_t count, size_t bytes)
{
    return fails() ? NULL : __libc_calloc(count, bytes);
}

void *realloc(void *old, size_t bytes)
{
    return fails() ? NULL : __libc_realloc(old, bytes);
}

void *aligned_alloc(size_t alignment, size_t bytes)
{
    return fails() ? NULL : __libc_memalign(alignment, bytes);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument)
{
    int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    *(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
    return atomic_load(&threads_fail) ? EAGAIN : real(thread, attributes, start, argument);
}
