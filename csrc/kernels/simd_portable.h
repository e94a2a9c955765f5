/* SPDX-License-Identifier: Apache-2.0
 *
 * simd_portable.h - the vector vocabulary (see simd.h) in C alone, for any CPU.
 */
#ifndef MHA_SIMD_PORTABLE_H
#define MHA_SIMD_PORTABLE_H

#include "simd.h"

#define REGISTERS 16
#define HOLD(v) ((void)0) /* register names are unknown here */
enum { lanes_f32 = 4, lanes_f64 = 2 };

/* GCC's vector extension. Most CPUs have registers of 16 bytes. The others give the same results. */
typedef float vec_f32 __attribute__((vector_size(16)));
typedef double vec_f64 __attribute__((vector_size(16)));
typedef int32_t bits_f32 __attribute__((vector_size(16)));
typedef int64_t bits_f64 __attribute__((vector_size(16)));

static inline vec_f32 load_f32(const float *p) { vec_f32 v; memcpy(&v, p, sizeof v); return v; }
static inline vec_f64 load_f64(const double *p) { vec_f64 v; memcpy(&v, p, sizeof v); return v; }
static inline void store_f32(float *p, vec_f32 v) { memcpy(p, &v, sizeof v); }
static inline void store_f64(double *p, vec_f64 v) { memcpy(p, &v, sizeof v); }
static inline vec_f32 splat_f32(float x) { return (vec_f32){x, x, x, x}; }
static inline vec_f64 splat_f64(double x) { return (vec_f64){x, x}; }
static inline vec_f32 broadcast_f32(const float *p) { return splat_f32(*p); }
static inline vec_f64 broadcast_f64(const double *p) { return splat_f64(*p); }
static inline vec_f32 fma_f32(vec_f32 a, vec_f32 b, vec_f32 c) { return a * b + c; }
static inline vec_f64 fma_f64(vec_f64 a, vec_f64 b, vec_f64 c) { return a * b + c; }

static inline vec_f32 max_f32(vec_f32 a, vec_f32 b)
{
    const bits_f32 greater = a > b;
    return (vec_f32)((greater & (bits_f32)a) | (~greater & (bits_f32)b));
}

static inline vec_f64 max_f64(vec_f64 a, vec_f64 b)
{
    const bits_f64 greater = a > b;
    return (vec_f64)((greater & (bits_f64)a) | (~greater & (bits_f64)b));
}

static inline vec_f32 power_f32(vec_f32 v)
{
    bits_f32 k = (bits_f32)v, rest;
    MHA_UNROLL
    for (int i = 0; i < 4; i++)
        rest[i] = mha_powers[k[i] & 7];
    return (vec_f32)((k << 20) + rest);
}

static inline vec_f64 power_f64(vec_f64 v) { return (vec_f64)((bits_f64)v << 52); }
static inline vec_f32 zero_below_f32(vec_f32 v, vec_f32 t, vec_f32 x) { return (vec_f32)(~(t < x) & (bits_f32)v); }
static inline vec_f64 zero_below_f64(vec_f64 v, vec_f64 t, vec_f64 x) { return (vec_f64)(~(t < x) & (bits_f64)v); }

static inline vec_f32 either_f32(vec_f32 a, vec_f32 b) { return (vec_f32)((bits_f32)a | (bits_f32)b); }
static inline vec_f64 either_f64(vec_f64 a, vec_f64 b) { return (vec_f64)((bits_f64)a | (bits_f64)b); }
static inline vec_f32 unlike_f32(vec_f32 a, vec_f32 b) { return (vec_f32)((bits_f32)a ^ (bits_f32)b); }
static inline vec_f64 unlike_f64(vec_f64 a, vec_f64 b) { return (vec_f64)((bits_f64)a ^ (bits_f64)b); }

static inline vec_f32 hide_f32(vec_f32 words, size_t i)
{
    const bits_f32 one = {1, 1, 1, 1};
    return (vec_f32)((((bits_f32)words >> (int)i & one) == one) & (bits_f32)splat_f32(-INFINITY));
}

static inline vec_f64 hide_f64(vec_f64 words, size_t i)
{
    const bits_f64 one = {1, 1};
    return (vec_f64)((((bits_f64)words >> (int)i & one) == one) & (bits_f64)splat_f64(-INFINITY));
}

static inline uint64_t nonzero(const char *p)
{
    uint64_t bits = 0;
    for (size_t i = 0; i < 16; i++)
        bits |= (uint64_t)(p[i] != 0) << i;
    return bits;
}

static inline vec_f32 widen_bf16(const uint16_t *p)
{
    vec_f32 v;
    MHA_UNROLL
    for (int i = 0; i < 4; i++) {
        const uint32_t bits = (uint32_t)p[i] << 16;
        memcpy((char *)&v + i * 4, &bits, sizeof bits);
    }
    return v;
}

static inline vec_f32 widen_f16(const uint16_t *p)
{
    vec_f32 v;
    for (int i = 0; i < 4; i++) {
        const uint32_t sign = (uint32_t)(p[i] & 0x8000) << 16, magnitude = p[i] & 0x7fff;
        uint32_t bits = (magnitude << 13) + 0x38000000; /* the exponents differ by 112 */
        if (magnitude >= 0x7c00) /* infinite, or NaN, which becomes quiet */
            bits = magnitude << 13 | 0x7f800000 | (magnitude > 0x7c00 ? 0x400000 : 0);
        const float subnormal = (float)magnitude * 0x1p-24f;
        if (magnitude < 0x400)
            memcpy(&bits, &subnormal, sizeof bits);
        bits |= sign;
        memcpy((char *)&v + i * 4, &bits, sizeof bits);
    }
    return v;
}

static inline vec_f32 round_bf16(vec_f32 v)
{
    for (int i = 0; i < 4; i++) {
        uint32_t bits;
        memcpy(&bits, (const char *)&v + i * 4, sizeof bits);
        const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
        bits = (is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
        memcpy((char *)&v + i * 4, &bits, sizeof bits);
    }
    return v;
}

static inline void narrow_bf16(uint16_t *p, vec_f32 v)
{
    v = round_bf16(v);
    for (int i = 0; i < 4; i++) {
        uint32_t bits;
        memcpy(&bits, (const char *)&v + i * 4, sizeof bits);
        p[i] = (uint16_t)(bits >> 16);
    }
}

static inline vec_f32 swap_neighbours(vec_f32 v) { return (vec_f32){v[1], v[0], v[3], v[2]}; }

/* Adding 0.5 rounds what is below 2^-14 to a multiple of 2^-24, which is a unit of subnormal halves. */
static inline void narrow_f16(uint16_t *p, vec_f32 v)
{
    for (int i = 0; i < 4; i++) {
        uint32_t bits, magnitude, rounded;
        memcpy(&bits, (const char *)&v + i * 4, sizeof bits);
        magnitude = bits & 0x7fffffff;
        if (magnitude > 0x7f800000) {
            rounded = 0x7e00 | (magnitude >> 13 & 0x3ff);
        } else if (magnitude >= 0x47800000) { /* at least 2^16 */
            rounded = 0x7c00;
        } else if (magnitude < 0x38800000) { /* below 2^-14 */
            float sum;
            memcpy(&sum, &magnitude, sizeof sum);
            sum += 0.5f;
            memcpy(&rounded, &sum, sizeof rounded);
            rounded -= 0x3f000000;
        } else {
            rounded = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
        }
        p[i] = (uint16_t)(rounded | (bits >> 16 & 0x8000));
    }
}

static inline void transpose_f32(vec_f32 v[4])
{
    MHA_UNROLL
    for (int i = 0; i < 4; i++)
        MHA_UNROLL
        for (int j = 0; j < i; j++) {
            const float x = v[i][j];
            v[i][j] = v[j][i];
            v[j][i] = x;
        }
}

static inline void transpose_f64(vec_f64 v[2])
{
    const double x = v[0][1];
    v[0][1] = v[1][0];
    v[1][0] = x;
}

/* ---- Integers, see int8.inc.h and groups.inc.h ---- */

typedef bits_f32 vec_i32;
typedef int16_t row_int;
enum { WEIGHT_OFFSET = 0 };

static inline vec_i32 splat_i32(int32_t x) { return (vec_i32){x, x, x, x}; }
static inline vec_i32 add_i32(vec_i32 a, vec_i32 b) { return a + b; }
static inline vec_i32 bits_of(vec_f32 v) { return (vec_i32)v; }
static inline vec_f32 real_of(vec_i32 v) { return (vec_f32){(float)v[0], (float)v[1], (float)v[2], (float)v[3]}; }
static inline vec_i32 without_sign(vec_i32 bits) { return bits & splat_i32(0x7fffffff); }

static inline vec_i32 max_i32(vec_i32 a, vec_i32 b)
{
    const vec_i32 is_less = a < b;
    return (a & ~is_less) | (b & is_less);
}

/* Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum. */
static inline vec_i32 rounded(vec_f32 v)
{
    return (vec_i32)(v + splat_f32(0x1.8p23f)) - splat_i32(0x4b400000);
}

static inline void store_row(row_int *p, vec_i32 v)
{
    const row_int four[] = {(row_int)v[0], (row_int)v[1], (row_int)v[2], (row_int)v[3]};
    memcpy(p, four, sizeof four);
}

static inline vec_i32 load_group(const int8_t *p)
{
    int16_t wide[8];
    vec_i32 v;
    for (int i = 0; i < 8; i++)
        wide[i] = p[i];
    memcpy(&v, wide, sizeof v);
    return v;
}

/* The halves of each integer are numbers of their own. */
static inline vec_i32 add_products(vec_i32 c, vec_i32 a, vec_i32 b)
{
    const vec_i32 upper = (a >> 16) * (b >> 16), lower = (a << 16 >> 16) * (b << 16 >> 16);
    return c + upper + lower;
}

#endif
