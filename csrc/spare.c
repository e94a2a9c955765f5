/* SPDX-License-Identifier: Apache-2.0
 *
 * spare.c - the workspace that one call leaves to the next.
 *
 * Owns: two spare workspaces, which any thread may take and give back.
 */
#include "spare.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

enum {
    LARGE = 128 << 10,    /* bytes; from this size on a spare workspace is kept apart from those of small calls */
    MAX_SPARE = 64 << 20, /* bytes; the system may take back what a spare workspace has beyond this size */
};

/* The workspaces that the last calls left: a small one and a large one. Fresh memory would cost a page fault per page
 * in every call, and a second one in the host if a virtual machine's host reclaims free memory. */
static _Atomic(char *) spares[2];

/* Stands in the first cache line of a workspace. */
typedef struct {
    size_t bytes; /* of the whole block */
    size_t taken; /* of these, those that the current or last call uses */
} header;

_Static_assert(sizeof(header) <= MHA_CACHE_LINE, "it lies in the first cache line");

static header *header_of(char *memory)
{
    return (header *)(void *)memory;
}

static _Atomic(char *) *spare_of(size_t bytes)
{
    return &spares[bytes >= LARGE];
}

mha_status mha_take_workspace(const mha_plan *plan, char **workspace)
{
    *workspace = NULL;
    if (mha_is_too_large(&plan->layout))
        return MHA_TOO_LARGE;
    const size_t bytes = plan->layout.bytes + MHA_CACHE_LINE;
    char *memory = atomic_exchange(spare_of(bytes), NULL);
    if (memory && header_of(memory)->bytes < bytes) {
        free(memory);
        memory = NULL;
    }
    if (!memory) {
        memory = mha_allocate_bytes(bytes);
        if (!memory)
            return MHA_NO_MEMORY;
        header_of(memory)->bytes = bytes;
    }
    header_of(memory)->taken = bytes;
    *workspace = memory + MHA_CACHE_LINE;
    mha_set_pointers(plan, *workspace);
    return MHA_OK;
}

/* Offers the pages of a spare workspace beyond MAX_SPARE to the system, which may take them until they are written to
 * again. Returns false where that is not possible. */
static bool offer(char *memory)
{
    const header *h = header_of(memory);
    if (h->taken <= MAX_SPARE)
        return true; /* the last call did not write to those pages */
#ifdef MADV_FREE
    /* Only whole huge pages are offered: to offer a part of one would split it. */
    const size_t end = (h->bytes + MHA_HUGE_PAGE - 1) / MHA_HUGE_PAGE * MHA_HUGE_PAGE;
    return madvise(memory + MAX_SPARE, end - MAX_SPARE, MADV_FREE) == 0;
#else
    return false;
#endif
}

void mha_give_workspace(char *workspace)
{
    char *memory = workspace ? workspace - MHA_CACHE_LINE : NULL;
    if (memory && offer(memory))
        memory = atomic_exchange(spare_of(header_of(memory)->bytes), memory);
    free(memory);
}

void mha_free_spare(void)
{
    for (size_t i = 0; i < sizeof spares / sizeof *spares; i++)
        free(atomic_exchange(&spares[i], NULL));
}
