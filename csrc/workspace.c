/* SPDX-License-Identifier: Apache-2.0
 *
 * workspace.c - checked sizes and aligned memory.
 *
 * Assumes C11's aligned_alloc.
 */
#include "workspace.h"

#include <stdlib.h>

enum { CACHE_LINE = 64 };

static bool multiply(size_t a, size_t b, size_t *product)
{
    return !__builtin_mul_overflow(a, b, product);
}

size_t mha_reserve(mha_layout *layout, size_t rows, size_t columns, size_t item)
{
    const size_t offset = layout->bytes;
    size_t bytes;
    if (!multiply(rows, columns, &bytes) || !multiply(bytes, item, &bytes) ||
        __builtin_add_overflow(bytes, CACHE_LINE - 1, &bytes) ||
        __builtin_add_overflow(offset, bytes / CACHE_LINE * CACHE_LINE, &layout->bytes) ||
        layout->bytes > PTRDIFF_MAX)
        layout->too_large = true;
    return offset;
}

mha_status mha_allocate(const mha_layout *layout, char **block)
{
    *block = NULL;
    if (layout->too_large)
        return MHA_TOO_LARGE;
    *block = aligned_alloc(CACHE_LINE, layout->bytes ? layout->bytes : CACHE_LINE);
    return *block ? MHA_OK : MHA_NO_MEMORY;
}

void mha_release(char *block)
{
    free(block);
}

size_t mha_row_stride(size_t width, size_t lanes, size_t item)
{
    const size_t line = CACHE_LINE / item;
    const size_t whole = (width + lanes - 1) / lanes * lanes;
    const size_t lines = (whole + line - 1) / line;
    return (lines + (lines % 2 == 0)) * line; /* an odd number of cache lines: rows visit every set in turn */
}
