/* SPDX-License-Identifier: Apache-2.0
 *
 * sizes.h - arithmetic on sizes that cannot overflow.
 */
#ifndef MHA_SIZES_H
#define MHA_SIZES_H

#include <stddef.h>

static inline size_t mha_divide_up(size_t a, size_t b)
{
    return (a + b - 1) / b;
}

static inline size_t mha_smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

static inline size_t mha_larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* The first element of part i when `total` elements are divided among `parts` as evenly as possible, larger parts
 * first. For i = parts it is `total`. */
static inline size_t mha_first_of_part(size_t total, size_t parts, size_t i)
{
    return total / parts * i + mha_smaller(i, total % parts);
}

#endif
