/* SPDX-License-Identifier: Apache-2.0
 *
 * avx512_bf16.c - products of bfloat16 over the vocabulary of simd_avx512.h, with AVX512_BF16.
 */
#include <math.h>
#include <string.h>

#include "kernels.h"

#ifdef MHA_KNOWS_AVX512_BF16
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,fma")
#endif
#include "simd_avx512.h"
#include "tiles.h"

/* A group is two halves, in the order of the row. The last group of an odd row has a 0. */
static size_t row_words(size_t n)
{
    return whole_vectors(n) / 2;
}

static void round_row(const float *x, size_t n, uint32_t largest_bits, uint32_t *row)
{
    uint16_t *halves = (uint16_t *)(void *)row;
    (void)largest_bits;
    for (size_t i = 0; i < n; i += lanes_f32)
        _mm256_storeu_si256((__m256i *)(void *)(halves + i), (__m256i)_mm512_cvtneps_pbh(load_some(x + i, n - i)));
}

/* The halves of two rows, each in turn: a number of the first row is the lower half of a word. */
static inline vec_i32 pair(vec_f32 first, vec_f32 second)
{
    static const uint16_t in_turn[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const vec_i32 both = (vec_i32)_mm512_cvtne2ps_pbh(second, first);
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(in_turn), both);
}

static void pair_rows(const float *x, size_t x_row, size_t depth, size_t width, uint32_t *columns)
{
    const size_t row = whole_vectors(width);
    for (size_t k = 0; k < depth; k += 2, x += 2 * x_row, columns += row)
        for (size_t i = 0; i < width; i += lanes_f32) {
            const vec_f32 first = load_some(x + i, width - i);
            const vec_f32 second = k + 1 < depth ? load_some(x + x_row + i, width - i) : splat_f32(0);
            _mm512_storeu_si512(columns + i, pair(first, second));
        }
}

typedef vec_f32 sum_bf16_pairs;
enum { HEADER_bf16_pairs = 0, GROUP_BYTES_bf16_pairs = 4, ADJACENT_bf16_pairs = 0 };

static inline vec_f32 begin_bf16_pairs(const uint32_t *row)
{
    (void)row;
    return splat_f32(0);
}

static inline vec_i32 load_bf16_pairs(const char *b) { return _mm512_loadu_si512(b); }

static inline vec_f32 add_bf16_pairs(vec_f32 c, vec_i32 a, vec_i32 b)
{
    c = _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
    HOLD(c);
    return c;
}

static inline void end_bf16_pairs(vec_f32 sum, const uint32_t *row, const mha_product *p, size_t lane,
                                  const float *addend, float *c)
{
    (void)row;
    if (addend && p->factor)
        sum = fma_f32(load_f32(addend + lane), load_f32((const float *)p->factor + lane), sum);
    else if (addend)
        sum = load_f32(addend + lane) + sum;
    store_f32(c + lane, sum);
}

#define OF bf16_pairs
#include "groups.inc.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const mha_narrow_kernels mha_bf16_avx512_bf16 = {
    .group = 2, .group_bytes = 4, .vectors = 3, .chain = MHA_CHAIN, .row_words = row_words, .take_row = round_row,
    .take_columns = pair_rows, .product = product_bf16_pairs,
};
#endif
