/* SPDX-License-Identifier: Apache-2.0
 *
 * numbers.h - numbers of every type behind one set of functions, pseudo-random ones, and hashes of them.
 *
 * Tests compute with doubles that hold a number of the dtype exactly. A sum, difference, product or quotient of two
 * floats that is rounded to double and then to float is the float that one rounding gives, since a double has more
 * than twice as many bits. A fused multiply-add has three operands and needs fmaf().
 */
#ifndef MHA_TESTS_NUMBERS_H
#define MHA_TESTS_NUMBERS_H

#include <float.h>
#include <math.h>
#include <string.h>

#include "mha.h"

static inline const char *dtype_name(mha_dtype dtype)
{
    static const char *const names[] = {"float32", "float64", "bfloat16", "float16"};
    return names[dtype];
}

static inline double eps_of(mha_dtype dtype)
{
    return dtype == MHA_FLOAT32 ? FLT_EPSILON : DBL_EPSILON;
}

static inline double lowest_of(mha_dtype dtype)
{
    return dtype == MHA_FLOAT32 ? -FLT_MAX : -DBL_MAX;
}

static inline double smallest_of(mha_dtype dtype) /* normal number */
{
    return dtype == MHA_FLOAT32 ? FLT_MIN : DBL_MIN;
}

static inline double rounded(mha_dtype dtype, double x)
{
    return dtype == MHA_FLOAT32 ? (double)(float)x : x;
}

static inline double fused(mha_dtype dtype, double a, double b, double c)
{
    return dtype == MHA_FLOAT32 ? (double)fmaf((float)a, (float)b, (float)c) : fma(a, b, c);
}

/* ---- Halves, from their definition: a sign, an exponent and a fraction ---- */

static inline int fraction_bits(mha_dtype half)
{
    return half == MHA_BFLOAT16 ? 7 : 10;
}

static inline int exponent_bias(mha_dtype half)
{
    return half == MHA_BFLOAT16 ? 127 : 15;
}

static inline double half_value(mha_dtype half, unsigned bits)
{
    const int f = fraction_bits(half), bias = exponent_bias(half), exponent = (int)(bits & 0x7fff) >> f;
    const unsigned fraction = bits & ((1u << f) - 1);
    double x = exponent == 0 ? ldexp(fraction, 1 - bias - f) : ldexp(fraction + (1u << f), exponent - bias - f);
    if (exponent == 2 * bias + 1)
        x = fraction ? NAN : INFINITY;
    return bits & 0x8000 ? -x : x;
}

/* The half nearest to a number that is not NaN, ties to even. */
static inline unsigned nearest_half(mha_dtype half, double x)
{
    const int f = fraction_bits(half), bias = exponent_bias(half);
    const unsigned sign = signbit(x) ? 0x8000 : 0, infinite = (unsigned)(2 * bias + 1) << f;
    const double size = fabs(x);
    if (size >= ldexp(1, bias + 1))
        return sign | infinite;
    int exponent = size > 0 ? ilogb(size) : 1 - bias;
    exponent = exponent < 1 - bias ? 1 - bias : exponent;
    /* a fraction that is rounded up to the next power of two carries into the exponent, as it should */
    return sign | ((unsigned)nearbyint(ldexp(size, f - exponent)) + ((unsigned)(exponent + bias - 1) << f));
}

/* ---- Numbers, read and written at any address, aligned or not ---- */

static inline double get_at(mha_dtype dtype, const void *at)
{
    uint16_t half;
    float f;
    double d;
    if (mha_is_half(dtype)) {
        memcpy(&half, at, sizeof half);
        return half_value(dtype, half);
    }
    if (dtype == MHA_FLOAT64) {
        memcpy(&d, at, sizeof d);
        return d;
    }
    memcpy(&f, at, sizeof f);
    return (double)f;
}

static inline void put_at(mha_dtype dtype, void *at, double x)
{
    const float f = (float)x;
    if (mha_is_half(dtype))
        memcpy(at, &(uint16_t){(uint16_t)nearest_half(dtype, x)}, sizeof(uint16_t));
    else if (dtype == MHA_FLOAT64)
        memcpy(at, &x, sizeof x);
    else
        memcpy(at, &f, sizeof f);
}

static inline double get(mha_dtype dtype, const void *x, ptrdiff_t i)
{
    return get_at(dtype, (const char *)x + i * (ptrdiff_t)mha_size_of(dtype));
}

static inline void put(mha_dtype dtype, void *x, ptrdiff_t i, double value)
{
    put_at(dtype, (char *)x + i * (ptrdiff_t)mha_size_of(dtype), value);
}

/* The same bits; any two NaNs are alike. */
static inline bool identical(double a, double b)
{
    return (isnan(a) && isnan(b)) || memcmp(&a, &b, sizeof a) == 0;
}

/* The i-th of a sequence of random words (SplitMix64, by Steele, Lea and Flood). */
static inline uint64_t random_word(uint64_t seed, uint64_t i)
{
    uint64_t z = (seed * 0x9e3779b97f4a7c15u) ^ (i + 1) * 0xd1342543de82ef95u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Uniform in [-1, 1), exact in either dtype: no library function may differ from one machine to the next. */
static inline double random_number(mha_dtype dtype, uint64_t seed, uint64_t i)
{
    const uint64_t word = random_word(seed, i);
    return dtype == MHA_FLOAT32 ? (double)(word >> 40) * 0x1p-23 - 1 : (double)(word >> 11) * 0x1p-52 - 1;
}

/* One step of FNV-1a over the eight bytes of a number; every NaN counts as the same one, and the sign of 0 counts. */
static inline void hash_number(uint64_t *hash, double x)
{
    uint64_t bits = 0x7ff8000000000000u;
    if (!isnan(x))
        memcpy(&bits, &x, sizeof bits);
    for (int i = 0; i < 8; i++)
        *hash = (*hash ^ (bits >> (8 * i) & 0xff)) * 0x100000001b3u;
}

enum { HASH_OF_NOTHING = 0x811c9dc5 };

#endif
