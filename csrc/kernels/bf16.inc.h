/* SPDX-License-Identifier: Apache-2.0
 *
 * bf16.inc.h - products of bfloat16 by FMAs (files of instruction sets include it after kernels.inc.h).
 *
 * Two FMAs of bfloat16 numbers as float32 give the bits of vdpbf16ps, if they come in its order. So rows and panels
 * hold neighbours in swapped order, and the tile of float32 does the rest. The last number of an odd depth has no
 * neighbour, and keeps its place.
 */

static size_t swapped_row_words(size_t n)
{
    return n;
}

/* Some numbers rounded to bfloat16, as float32. Subnormal ones become 0, as AVX512_BF16 converts them. */
static inline vec_f32 load_rounded(const float *x, size_t n)
{
    const vec_f32 v = load_some(x, n), magnitude = max_f32(v, splat_f32(0) - v);
    return zero_below_f32(round_bf16(v), magnitude, splat_f32(0x1p-126f));
}

static void swap_row(const float *x, size_t n, uint32_t largest_bits, uint32_t *row)
{
    float last[lanes_f32];
    size_t i = 0;
    (void)largest_bits;
    for (; i + lanes_f32 <= n; i += lanes_f32)
        store_f32((float *)(void *)(row + i), swap_neighbours(load_rounded(x + i, lanes_f32)));
    if (i == n)
        return;
    store_f32(last, load_rounded(x + i, n - i));
    for (size_t k = 0; k < n - i; k++) {
        const size_t neighbour = k ^ 1;
        memcpy(row + i + k, last + (neighbour < n - i ? neighbour : k), sizeof *row);
    }
}

static void swap_rows(const float *x, size_t x_row, size_t depth, size_t width, uint32_t *columns)
{
    const size_t row = whole_vectors(width);
    float *to = (float *)(void *)columns;
    for (size_t k = 0; k < depth; k += 2, x += 2 * x_row, to += 2 * row)
        for (size_t i = 0; i < width; i += lanes_f32) {
            const vec_f32 first = load_rounded(x + i, width - i);
            if (k + 1 < depth)
                store_f32(to + i, load_rounded(x + x_row + i, width - i));
            store_f32(to + (k + 1 < depth ? row : 0) + i, first);
        }
}

#define MHA_BF16_BY_FMA \
    { \
        .group = 1, .group_bytes = sizeof(uint16_t), .vectors = VECTORS, .chain = MHA_CHAIN, \
        .row_words = swapped_row_words, .take_row = swap_row, .take_columns = swap_rows, .product = product_f32, \
    }
