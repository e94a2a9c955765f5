/* SPDX-License-Identifier: Apache-2.0
 *
 * sizes.h - arithmetic on sizes that needs no check.
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

#endif
