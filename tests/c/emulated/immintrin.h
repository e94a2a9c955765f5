/* SPDX-License-Identifier: Apache-2.0
 *
 * immintrin.h - AVX-512 for a CPU that has only AVX2, FMA and F16C: SIMDe's functions in place of the compiler's.
 *
 * Below are those that SIMDe 0.7.4 lacks or declares otherwise, and one that it adds up in another order. A function
 * that is neither there nor here does not compile, because the compiler's own needs AVX-512.
 */
#ifndef MHA_TESTS_IMMINTRIN_H
#define MHA_TESTS_IMMINTRIN_H

#include_next <immintrin.h>

#include <stdint.h>
#include <string.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

/* ---- Those that SIMDe has by its own names only, or with other arguments by Intel's ---- */

#undef _mm512_madd_epi16
#define _mm512_madd_epi16 simde_mm512_madd_epi16
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 simde_mm512_shuffle_f32x4
#undef _mm512_shuffle_f64x2
#define _mm512_shuffle_f64x2 simde_mm512_shuffle_f64x2

/* ---- Numbers of other widths ---- */

typedef int8_t emulated_i8 __attribute__((vector_size(16)));
typedef int16_t emulated_i16 __attribute__((vector_size(32)));
typedef uint16_t emulated_u16 __attribute__((vector_size(32)));
typedef int32_t emulated_i32 __attribute__((vector_size(64)));
typedef uint32_t emulated_u32 __attribute__((vector_size(64)));

#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32(a) ((__m512i)__builtin_convertvector((emulated_u16)(a), emulated_u32))

#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16(a) ((__m256i)__builtin_convertvector((emulated_i32)(a), emulated_i16))

#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8(a) ((__m128i)__builtin_convertvector((emulated_i32)(a), emulated_i8))

#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps(a) __builtin_convertvector((emulated_i32)(a), __m512)

/* ---- By the instructions for 32 bytes, a half after the other ---- */

typedef union {
    __m512 whole;
    __m256 half[2];
} emulated_reals;

typedef union {
    __m512i whole;
    __m256i half[2];
} emulated_integers;

typedef union {
    __m256i whole;
    __m128i half[2];
} emulated_short_integers;

static inline __m512i emulated_cvtps_epi32(__m512 a)
{
    const emulated_reals x = {a};
    emulated_integers y;
    for (int i = 0; i < 2; i++)
        y.half[i] = _mm256_cvtps_epi32(x.half[i]);
    return y.whole;
}
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 emulated_cvtps_epi32

static inline __m512 emulated_cvtph_ps(__m256i a)
{
    const emulated_short_integers x = {a};
    emulated_reals y;
    for (int i = 0; i < 2; i++)
        y.half[i] = _mm256_cvtph_ps(x.half[i]);
    return y.whole;
}
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated_cvtph_ps

static inline __m256 emulated_half(__m512 a, int i)
{
    const emulated_reals x = {a};
    return x.half[i];
}
/* A macro, because the rounding is a constant in the instruction. */
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, rounding) \
    _mm256_set_m128i(_mm256_cvtps_ph(emulated_half(a, 1), rounding), _mm256_cvtps_ph(emulated_half(a, 0), rounding))

static inline __mmask16 emulated_test_epi8_mask(__m128i a, __m128i b)
{
    return (__mmask16)~_mm_movemask_epi8(_mm_cmpeq_epi8(_mm_and_si128(a, b), _mm_setzero_si128()));
}
#undef _mm_test_epi8_mask
#define _mm_test_epi8_mask emulated_test_epi8_mask

/* ---- Products of halves ---- */

/* Two fused multiply-adds, of the upper numbers first. SIMDe adds the two products to each other first. Whatever the
 * caller's mode is, numbers are rounded to the nearest, and subnormal ones are zeros before and after each step. */
static inline __m256 emulated_dpbf16_of_half(__m256 sums, __m256i a, __m256i b)
{
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
    const unsigned mode = 0x9fc0, callers = _mm_getcsr(); /* no exceptions, flush to zero, zeros for subnormals */
    __asm__("vldmxcsr %5\n\tvfmadd231ps %2, %1, %0\n\tvfmadd231ps %4, %3, %0\n\tvldmxcsr %6"
            : "+&x"(sums)
            : "x"(_mm256_and_si256(a, upper)), "x"(_mm256_and_si256(b, upper)), "x"(_mm256_slli_epi32(a, 16)),
              "x"(_mm256_slli_epi32(b, 16)), "m"(mode), "m"(callers));
    return sums;
}

static inline __m512 emulated_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b)
{
    const emulated_integers x = {(__m512i)a}, y = {(__m512i)b};
    emulated_reals z = {sums};
    for (int i = 0; i < 2; i++)
        z.half[i] = emulated_dpbf16_of_half(z.half[i], x.half[i], y.half[i]);
    return z.whole;
}
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps emulated_dpbf16_ps

/* To bfloat16, in any mode: to the nearest, ties to even; subnormal numbers become zeros, and NaN becomes quiet. */
static inline uint16_t emulated_bf16(uint32_t bits)
{
    const uint32_t magnitude = bits & 0x7fffffff, upper = bits >> 16;
    if (magnitude < 0x00800000)
        return (uint16_t)(upper & 0x8000);
    if (magnitude > 0x7f800000)
        return (uint16_t)(upper | 0x40);
    return (uint16_t)((bits + 0x7fff + (upper & 1)) >> 16);
}

static inline __m512bh emulated_cvtne2ps_pbh(__m512 upper, __m512 lower)
{
    uint32_t from[32];
    uint16_t to[32];
    __m512bh halves;
    _mm512_storeu_ps(from, lower);
    _mm512_storeu_ps(from + 16, upper);
    for (int i = 0; i < 32; i++)
        to[i] = emulated_bf16(from[i]);
    memcpy(&halves, to, sizeof halves);
    return halves;
}
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh emulated_cvtne2ps_pbh

static inline __m256bh emulated_cvtneps_pbh(__m512 a)
{
    const __m512bh twice = emulated_cvtne2ps_pbh(a, a);
    __m256bh halves;
    memcpy(&halves, &twice, sizeof halves);
    return halves;
}
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh

/* No register holds 64 bytes. The kernels' statements in assembly hold values in registers and compute nothing. */
#define __asm__(...) ((void)0)

#endif
