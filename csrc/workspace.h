/* SPDX-License-Identifier: Apache-2.0
 *
 * workspace.h - the memory of a call: checked sizes, and one block for all of them.
 */
#ifndef MHA_WORKSPACE_H
#define MHA_WORKSPACE_H

#include <assert.h>

#include "base.h"

enum { MHA_CACHE_LINE = 64, MHA_HUGE_PAGE = 2 << 20 }; /* in bytes */

/* Sizes of pieces that will be one block. Initialise with zeros. */
typedef struct {
    size_t bytes; /* PTRDIFF_MAX after an overflow, so that a layout is too large, too, if this one is a piece of it */
} mha_layout;

static inline bool mha_is_too_large(const mha_layout *layout)
{
    return layout->bytes == PTRDIFF_MAX;
}

/* Reserves rows * columns elements of `size` bytes, aligned to a cache line, and returns their offset. It is inline
 * because a call reserves about twenty pieces. */
static inline size_t mha_reserve(mha_layout *layout, size_t rows, size_t columns, size_t size)
{
    const size_t offset = layout->bytes, max_bytes = PTRDIFF_MAX / 2; /* leaves room for what allocation adds */
    size_t bytes;
    if (__builtin_mul_overflow(rows, columns, &bytes) || __builtin_mul_overflow(bytes, size, &bytes) ||
        bytes > max_bytes || offset + bytes > max_bytes)
        layout->bytes = PTRDIFF_MAX;
    else
        layout->bytes = offset + (bytes + MHA_CACHE_LINE - 1) / MHA_CACHE_LINE * MHA_CACHE_LINE;
    return offset;
}

/* a * b, or 0 and a layout that is too large. */
static inline size_t mha_times(mha_layout *layout, size_t a, size_t b)
{
    size_t product;
    if (!__builtin_mul_overflow(a, b, &product))
        return product;
    layout->bytes = PTRDIFF_MAX;
    return 0;
}

/* A block whose pieces are reached by pointers. They are set after it is allocated. Begin with mha_begin_plan(). */
enum { MHA_MAX_POINTERS = 40 };
typedef struct {
    mha_layout layout;
    size_t pointers;
    struct {
        void *pointer; /* to a pointer of any type */
        size_t offset;
    } set[MHA_MAX_POINTERS];
} mha_plan;

/* `set` is left as it is. It takes more bytes than the rest of a tiny call's plan. */
static inline void mha_begin_plan(mha_plan *plan)
{
    plan->layout = (mha_layout){0};
    plan->pointers = 0;
}

/* Remembers to set *pointer to the address of an offset. The pointer must stay where it is until then. */
static inline void mha_point(mha_plan *plan, void *pointer, size_t offset)
{
    assert(plan->pointers < MHA_MAX_POINTERS);
    plan->set[plan->pointers].pointer = pointer;
    plan->set[plan->pointers++].offset = offset;
}

/* mha_reserve(), and *pointer will lead to the piece. */
static inline size_t mha_place(mha_plan *plan, void *pointer, size_t rows, size_t columns, size_t size)
{
    const size_t offset = mha_reserve(&plan->layout, rows, columns, size);
    mha_point(plan, pointer, offset);
    return offset;
}

/* Sets the pointers of a plan whose memory begins here. */
void mha_set_pointers(const mha_plan *plan, char *memory);

/* Allocates memory, aligned to a cache line if it is more than 1 KiB. Large blocks ask for huge pages: a call touches
 * more small pages than the TLB holds. */
char *mha_allocate_bytes(size_t bytes);

/* Allocates the planned block, uninitialised, and sets the pointers. Release it with mha_release(). */
mha_status mha_allocate(const mha_plan *plan, char **memory);
void mha_release(char *memory); /* NULL is allowed */

/* The distance between rows of `width` numbers that kernels write in whole vectors. It is never a large power of two,
 * which would map all rows to the same set of the first-level cache. */
size_t mha_row_stride(size_t width, size_t lanes, size_t size);

#endif
