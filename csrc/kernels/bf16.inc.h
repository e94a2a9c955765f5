/* SPDX-License-Identifier: Apache-2.0
 *
 * bf16.inc.h - products of bfloat16 by FMAs (the files of instruction sets include it after kernels.inc.h).
 *
 * Two FMAs of bfloat16 numbers as float32 give the bits of vdpbf16ps, if they come in its order. So rows and panels hold
 * neighbours in swapped order, and the tile of float32 does the rest.
 */

/* Rows have room for whole vectors. */
static size_t swapped_row_words(size_t n)
{
    return (n + lanes_f32 - 1) / lanes_f32 * lanes_f32;
}

/* Rounds at most MHA_CHAIN numbers to bfloat16, as float32, and swaps neighbours. */
static void swap_neighbours(const float *x, size_t n, uint32_t largest_bits, uint32_t *row)
{
    uint16_t halves[MHA_CHAIN];
    (void)largest_bits;
    narrow_all(MHA_BFLOAT16, x, n, halves);
    size_t i = 0;
    for (; i + 2 <= n; i += 2) {
        row[i] = (uint32_t)halves[i + 1] << 16;
        row[i + 1] = (uint32_t)halves[i] << 16;
    }
    if (i < n)
        row[i] = (uint32_t)halves[i] << 16;
}

#define MHA_BF16_BY_FMA \
    { \
        .group = 1, .group_bytes = sizeof(uint16_t), .vectors = VECTORS, .chain = MHA_CHAIN, \
        .row_words = swapped_row_words, .take_row = swap_neighbours, .product = product_f32, \
    }
