/* SPDX-License-Identifier: Apache-2.0
 *
 * int8.inc.h - products of int8, written once (the files of instruction sets include it after their simd_*.h).
 *
 * It needs, besides the vocabulary of float32:
 *   vec_i32                  lanes_f32 integers of 32 bits
 *   splat_i32(x), add_i32(a, b), max_i32(a, b)
 *   bits_of(v), real_of(v)   the bits of float32 as integers; integers to float32
 *   rounded(v)               float32 to integers, to the nearest, ties to even; |v| < 2^20
 *   without_sign(v)          bits of a number -> bits of its magnitude
 *   row_int                  what a row holds of each number: int16_t or int8_t. A group fills 32 bits.
 *   store_row(p, v)          integers to row_int
 *   load_group(p)            a group of each of lanes_f32 features
 *   add_products(c, a, b)    c + the sum of a group's products, in each lane; a: a group in all lanes, b: from
 *                            load_group(). It is held in a register: gcc would multiply a whole tile first, and spill.
 *   WEIGHT_OFFSET            what panels hold in addition to each weight
 */
#include "tiles.h"

enum { GROUP = 4 / sizeof(row_int) };
enum { LEAST = 0x03800000 /* the bits of 2^-120: its reciprocal times 127 is finite */, INFINITE = 0x7f800000 };

_Static_assert(MHA_INT8_FEATURES % GROUP == 0, "groups do not cross the sums of integers");

/* ---- Rows ---- */

/* Rows have room for whole vectors. */
static size_t row_words(size_t n)
{
    return MHA_ROW_HEADER + whole_vectors(n) / GROUP;
}

static uint32_t largest(const float *x, size_t n)
{
    vec_i32 most = splat_i32(0);
    for (size_t i = 0; i < n; i += lanes_f32)
        most = max_i32(most, without_sign(bits_of(load_some(x + i, n - i))));
    uint32_t lane[lanes_f32], result = 0;
    memcpy(lane, &most, sizeof lane);
    for (size_t i = 0; i < lanes_f32; i++)
        result = lane[i] > result ? lane[i] : result;
    return result;
}

static int32_t sum_of_lanes(vec_i32 v)
{
    int32_t lane[lanes_f32], sum = 0;
    memcpy(lane, &v, sizeof lane);
    for (size_t i = 0; i < lanes_f32; i++)
        sum += lane[i];
    return sum;
}

/* Panels hold WEIGHT_OFFSET in addition to each weight, which adds this to a sum for each unit of the row. So a sum
 * starts at minus that. */
static void quantize(const float *x, size_t n, uint32_t largest_bits, uint32_t *row)
{
    row_int *q = (row_int *)(void *)(row + MHA_ROW_HEADER);
    float most, scale = largest_bits >= INFINITE ? NAN : 0;
    int32_t start = 0;
    memcpy(&most, &largest_bits, sizeof most);
    if (largest_bits < LEAST || largest_bits >= INFINITE) {
        memset(q, 0, (row_words(n) - MHA_ROW_HEADER) * sizeof *row);
    } else {
        const vec_f32 inverse = splat_f32(127 / most);
        vec_i32 sum = splat_i32(0);
        for (size_t i = 0; i < n; i += lanes_f32) {
            const vec_i32 units = rounded(load_some(x + i, n - i) * inverse);
            store_row(q + i, units);
            sum = add_i32(sum, units);
        }
        scale = most / 127;
        start = -WEIGHT_OFFSET * sum_of_lanes(sum);
    }
    memcpy(row, &scale, sizeof scale);
    memcpy(row + 1, &start, sizeof start);
}

/* ---- Products ---- */

typedef vec_i32 sum_int8;
enum { HEADER_int8 = MHA_ROW_HEADER, GROUP_BYTES_int8 = GROUP, ADJACENT_int8 = 1 };

static inline vec_i32 begin_int8(const uint32_t *row) { return splat_i32((int32_t)row[1]); }
static inline vec_i32 load_int8(const char *b) { return load_group((const int8_t *)b); }
static inline vec_i32 add_int8(vec_i32 c, vec_i32 a, vec_i32 b) { return add_products(c, a, b); }

/* addend + sum * scales */
static inline void end_int8(vec_i32 sum, const uint32_t *row, const mha_product *p, size_t lane, const float *addend,
                            float *c)
{
    float row_scale;
    memcpy(&row_scale, row, sizeof row_scale);
    const vec_f32 scale = splat_f32(row_scale) * load_f32(p->b_scale + lane);
    store_f32(c + lane, fma_f32(real_of(sum), scale, addend ? load_f32(addend + lane) : splat_f32(0)));
}

#define OF int8
#include "groups.inc.h"

#define MHA_INT8_KERNELS \
    { \
        .group = GROUP, .group_bytes = GROUP, .vectors = REGISTERS == 16 ? 2 : 3, .chain = MHA_INT8_FEATURES, \
        .weight_offset = WEIGHT_OFFSET, .row_words = row_words, .largest = largest, .take_row = quantize, \
        .product = product_int8, \
    }
