/* SPDX-License-Identifier: Apache-2.0
 *
 * workspace.h - the memory of a call: checked sizes, and one block for all of them.
 */
#ifndef MHA_WORKSPACE_H
#define MHA_WORKSPACE_H

#include <assert.h>

#include "base.h"

#if defined __has_feature && !defined __SANITIZE_ADDRESS__
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1 /* as gcc says it */
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

enum { MHA_CACHE_LINE = 64, MHA_HUGE_PAGE = 2 << 20 }; /* in bytes */

/* AddressSanitizer reports what reaches beyond a block of memory, and not what reaches beyond a piece of it. In a build
 * for it, a red zone follows every piece, and mha_guard() forbids its bytes. Other builds have no red zones. */
#ifdef __SANITIZE_ADDRESS__
enum { MHA_RED_ZONE = 192, MHA_MAX_RED_ZONES = 64 }; /* in bytes, at least; in a layout */
#else
enum { MHA_RED_ZONE = 0 };
#endif

/* Sizes of pieces that will be one block. Initialise with zeros. */
typedef struct {
    size_t bytes; /* PTRDIFF_MAX after an overflow, so that a layout is too large, too, if this one is a piece of it */
#ifdef __SANITIZE_ADDRESS__
    size_t red_zones;
    struct {
        size_t begin, end;
    } red_zone[MHA_MAX_RED_ZONES];
#endif
} mha_layout;

static inline bool mha_is_too_large(const mha_layout *layout)
{
    return layout->bytes == PTRDIFF_MAX;
}

static inline void mha_add_red_zone(mha_layout *layout, size_t begin, size_t end)
{
#ifdef __SANITIZE_ADDRESS__
    assert(layout->red_zones < MHA_MAX_RED_ZONES);
    layout->red_zone[layout->red_zones].begin = begin;
    layout->red_zone[layout->red_zones++].end = end;
#else
    (void)layout, (void)begin, (void)end;
#endif
}

/* Forbids the red zones of a layout whose memory begins here, and allows its pieces. */
static inline void mha_guard(const mha_layout *layout, char *memory)
{
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(memory, layout->bytes);
    for (size_t i = 0; i < layout->red_zones; i++)
        ASAN_POISON_MEMORY_REGION(memory + layout->red_zone[i].begin,
                                  layout->red_zone[i].end - layout->red_zone[i].begin);
#else
    (void)layout, (void)memory;
#endif
}

/* Reserves rows * columns elements of `size` bytes, aligned to a cache line, and returns their offset. It is inline
 * because a call reserves about twenty pieces. */
static inline size_t mha_reserve(mha_layout *layout, size_t rows, size_t columns, size_t size)
{
    const size_t offset = layout->bytes, max_bytes = PTRDIFF_MAX / 2; /* leaves room for what allocation adds */
    size_t bytes;
    if (__builtin_mul_overflow(rows, columns, &bytes) || __builtin_mul_overflow(bytes, size, &bytes) ||
        bytes > max_bytes || offset + bytes > max_bytes) {
        layout->bytes = PTRDIFF_MAX;
    } else {
        layout->bytes = offset + (bytes + MHA_RED_ZONE + MHA_CACHE_LINE - 1) / MHA_CACHE_LINE * MHA_CACHE_LINE;
        mha_add_red_zone(layout, offset + bytes, layout->bytes);
    }
    return offset;
}

/* Reserves `count` copies of another layout, and returns the offset of the first. */
static inline size_t mha_reserve_copies(mha_layout *layout, size_t count, const mha_layout *one)
{
    const size_t offset = mha_reserve(layout, count, one->bytes, 1);
#ifdef __SANITIZE_ADDRESS__
    for (size_t i = 0; i < count * one->red_zones; i++) {
        const size_t copy = offset + i / one->red_zones * one->bytes, zone = i % one->red_zones;
        mha_add_red_zone(layout, copy + one->red_zone[zone].begin, copy + one->red_zone[zone].end);
    }
#endif
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

/* Sets the pointers of a plan whose memory begins here, and guards it. */
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
