/* SPDX-License-Identifier: Apache-2.0
 *
 * bf16.inc.h - products of bfloat16 by FMAs (files of instruction sets include it after kernels.inc.h).
 *
 * Two FMAs of bfloat16 numbers as float32 give the bits of vdpbf16ps, if they come in its order. So rows and panels
 * hold neighbours in swapped order, and the tile of float32 does the rest.
 */

static size_t swapped_row_words(size_t n)
{
    return n;
}

/* As float32, but 0 in place of a subnormal number, for which the instruction takes 0, too. */
static inline uint32_t normal_half(uint16_t half)
{
    return half & 0x7f80 ? (uint32_t)half << 16 : 0;
}

/* Rounds at most MHA_CHAIN numbers to bfloat16, as float32, and swaps neighbours. */
static void swap_neighbours(const float *x, size_t n, uint32_t largest_bits, uint32_t *row)
{
    uint16_t halves[MHA_CHAIN];
    (void)largest_bits;
    narrow_all(MHA_BFLOAT16, x, n, halves);
    size_t i = 0;
    for (; i + 2 <= n; i += 2) {
        row[i] = normal_half(halves[i + 1]);
        row[i + 1] = normal_half(halves[i]);
    }
    if (i < n)
        row[i] = normal_half(halves[i]);
}

#define MHA_BF16_BY_FMA \
    { \
        .group = 1, .group_bytes = sizeof(uint16_t), .vectors = VECTORS, .chain = MHA_CHAIN, \
        .row_words = swapped_row_words, .take_row = swap_neighbours, .product = product_f32, \
    }
