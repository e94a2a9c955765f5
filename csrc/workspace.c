/* SPDX-License-Identifier: Apache-2.0
 *
 * workspace.c - aligned memory.
 *
 * Assumes: C11's aligned_alloc.
 */
#include "workspace.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { SMALL = 1024 }; /* bytes; up to this size malloc is several times faster than aligned_alloc */

char *mha_allocate_bytes(size_t bytes)
{
    if (bytes <= SMALL)
        return malloc(bytes);
    const size_t alignment = bytes < 2 * MHA_HUGE_PAGE ? MHA_CACHE_LINE : MHA_HUGE_PAGE;
    char *memory = aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
#ifdef MADV_HUGEPAGE
    if (memory && alignment == MHA_HUGE_PAGE)
        (void)madvise(memory, bytes, MADV_HUGEPAGE); /* it is only advice */
#endif
    return memory;
}

void mha_set_pointers(const mha_plan *plan, char *memory)
{
    mha_guard(&plan->layout, memory);
    for (size_t i = 0; i < plan->pointers; i++) {
        const char *const address = memory + plan->set[i].offset;
        memcpy(plan->set[i].pointer, &address, sizeof address);
    }
}

mha_status mha_allocate(const mha_plan *plan, char **memory)
{
    *memory = NULL;
    if (mha_is_too_large(&plan->layout))
        return MHA_TOO_LARGE;
    *memory = mha_allocate_bytes(plan->layout.bytes ? plan->layout.bytes : MHA_CACHE_LINE);
    if (!*memory)
        return MHA_NO_MEMORY;
    mha_set_pointers(plan, *memory);
    return MHA_OK;
}

void mha_release(char *memory)
{
    free(memory);
}

size_t mha_row_stride(size_t width, size_t lanes, size_t size)
{
    const size_t line = MHA_CACHE_LINE / size;
    const size_t whole = (width + lanes - 1) / lanes * lanes;
    const size_t lines = (whole + line - 1) / line;
    /* with an odd number of cache lines, successive rows use all sets of the cache */
    return (lines + (lines % 2 == 0)) * line;
}
