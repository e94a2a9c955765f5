/* SPDX-License-Identifier: Apache-2.0
 *
 * simd_avx512.h - the vector vocabulary (see simd.h) for x86-64 with AVX-512 F, VL, BW and DQ: 32 registers
 * of 64 bytes.
 */
#ifndef MHA_SIMD_AVX512_H
#define MHA_SIMD_AVX512_H

#include "simd.h"

#define REGISTERS 32
/* Many rows take tiles of four rows, not eight, unless panels hold halves: a Zen 4 waits for the 24 stores at the end
 * of a tile of eight. 12 chains are still enough for two multiply-add units. */
#define ROWS_OF_MANY {8, 6, 4}
#define HOLD(v) __asm__("" : "+v"(v))
enum { lanes_f32 = 16, lanes_f64 = 8 };
typedef __m512 vec_f32;
typedef __m512d vec_f64;

static inline vec_f32 load_f32(const float *p) { return _mm512_loadu_ps(p); }
static inline vec_f64 load_f64(const double *p) { return _mm512_loadu_pd(p); }
static inline void store_f32(float *p, vec_f32 v) { _mm512_storeu_ps(p, v); }
static inline void store_f64(double *p, vec_f64 v) { _mm512_storeu_pd(p, v); }
static inline vec_f32 broadcast_f32(const float *p) { return _mm512_set1_ps(*p); }
static inline vec_f64 broadcast_f64(const double *p) { return _mm512_set1_pd(*p); }
static inline vec_f32 splat_f32(float x) { return _mm512_set1_ps(x); }
static inline vec_f64 splat_f64(double x) { return _mm512_set1_pd(x); }
static inline vec_f32 fma_f32(vec_f32 a, vec_f32 b, vec_f32 c) { return _mm512_fmadd_ps(a, b, c); }
static inline vec_f64 fma_f64(vec_f64 a, vec_f64 b, vec_f64 c) { return _mm512_fmadd_pd(a, b, c); }
static inline vec_f32 max_f32(vec_f32 a, vec_f32 b) { return _mm512_max_ps(a, b); }
static inline vec_f64 max_f64(vec_f64 a, vec_f64 b) { return _mm512_max_pd(a, b); }

static inline vec_f32 power_f32(vec_f32 v)
{
    const __m256i eight = _mm256_loadu_si256((const __m256i *)(const void *)mha_powers);
    const __m512i k = _mm512_castps_si512(v), rest = _mm512_permutexvar_epi32(k, _mm512_broadcast_i64x4(eight));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(k, 20), rest));
}

static inline vec_f64 power_f64(vec_f64 v)
{
    return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(v), 52));
}

static inline vec_f32 zero_below_f32(vec_f32 v, vec_f32 t, vec_f32 x)
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(t, x, _CMP_NLT_UQ), v);
}

static inline vec_f64 zero_below_f64(vec_f64 v, vec_f64 t, vec_f64 x)
{
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(t, x, _CMP_NLT_UQ), v);
}

static inline vec_f32 either_f32(vec_f32 a, vec_f32 b) { return _mm512_or_ps(a, b); }
static inline vec_f64 either_f64(vec_f64 a, vec_f64 b) { return _mm512_or_pd(a, b); }
static inline vec_f32 unlike_f32(vec_f32 a, vec_f32 b) { return _mm512_xor_ps(a, b); }
static inline vec_f64 unlike_f64(vec_f64 a, vec_f64 b) { return _mm512_xor_pd(a, b); }

static inline vec_f32 hide_f32(vec_f32 words, size_t i)
{
    const __mmask16 is_set = _mm512_test_epi32_mask(_mm512_castps_si512(words), _mm512_set1_epi32((int)(1u << i)));
    return _mm512_maskz_mov_ps(is_set, _mm512_set1_ps(-INFINITY));
}

static inline vec_f64 hide_f64(vec_f64 words, size_t i)
{
    const __mmask8 is_set =
        _mm512_test_epi64_mask(_mm512_castpd_si512(words), _mm512_set1_epi64((long long)(1ull << i)));
    return _mm512_maskz_mov_pd(is_set, _mm512_set1_pd(-INFINITY));
}

static inline uint64_t nonzero(const char *p)
{
    const __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm_test_epi8_mask(bytes, bytes);
}

static inline vec_f32 widen_bf16(const uint16_t *p)
{
    const __m256i halves = _mm256_loadu_si256((const __m256i *)(const void *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

static inline vec_f32 widen_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

static inline vec_f32 round_bf16(vec_f32 v)
{
    const __m512i x = _mm512_castps_si512(v), is_odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(x, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_or_epi32(nearest, is_nan, x, _mm512_set1_epi32(0x400000));
    return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32((int)0xffff0000)));
}

static inline void narrow_bf16(uint16_t *p, vec_f32 v)
{
    const __m512i rounded = _mm512_castps_si512(round_bf16(v));
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

static inline vec_f32 swap_neighbours(vec_f32 v) { return _mm512_shuffle_ps(v, v, 0xb1); }

static inline void narrow_f16(uint16_t *p, vec_f32 v)
{
    const __m256i halves = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256((__m256i *)(void *)p, halves);
}

/* Both transpositions are too large for gcc to inline by itself, and then v would go through memory. */
static inline __attribute__((always_inline)) void transpose_f64(vec_f64 v[8])
{
    vec_f64 pair[8], quad[8];
    MHA_UNROLL
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm512_unpacklo_pd(v[i], v[i + 1]);
        pair[i + 1] = _mm512_unpackhi_pd(v[i], v[i + 1]);
    }
    MHA_UNROLL
    for (int i = 0; i < 8; i += 4)
        MHA_UNROLL
        for (int j = 0; j < 2; j++) { /* 16-byte lanes 0 and 2 of both, then 1 and 3 */
            quad[i + j] = _mm512_shuffle_f64x2(pair[i + j], pair[i + j + 2], 0x88);
            quad[i + j + 2] = _mm512_shuffle_f64x2(pair[i + j], pair[i + j + 2], 0xdd);
        }
    MHA_UNROLL
    for (int j = 0; j < 4; j++) {
        v[j] = _mm512_shuffle_f64x2(quad[j], quad[j + 4], 0x88);
        v[j + 4] = _mm512_shuffle_f64x2(quad[j], quad[j + 4], 0xdd);
    }
}

static inline __attribute__((always_inline)) void transpose_f32(vec_f32 v[16])
{
    vec_f32 pair[16], quad[16], half[16];
    MHA_UNROLL
    for (int i = 0; i < 16; i += 2) {
        pair[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        pair[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    MHA_UNROLL
    for (int i = 0; i < 16; i += 4)
        MHA_UNROLL
        for (int j = 0; j < 2; j++) {
            quad[i + 2 * j] = _mm512_shuffle_ps(pair[i + j], pair[i + j + 2], 0x44);
            quad[i + 2 * j + 1] = _mm512_shuffle_ps(pair[i + j], pair[i + j + 2], 0xee);
        }
    MHA_UNROLL
    for (int i = 0; i < 16; i += 8) /* quad[i + j], lane q: column 4 q + j of rows i .. i + 3 */
        MHA_UNROLL
        for (int j = 0; j < 4; j++) {
            half[i + j] = _mm512_shuffle_f32x4(quad[i + j], quad[i + j + 4], 0x88);
            half[i + j + 4] = _mm512_shuffle_f32x4(quad[i + j], quad[i + j + 4], 0xdd);
        }
    MHA_UNROLL
    for (int j = 0; j < 8; j++) {
        v[j] = _mm512_shuffle_f32x4(half[j], half[j + 8], 0x88);
        v[j + 8] = _mm512_shuffle_f32x4(half[j], half[j + 8], 0xdd);
    }
}

/* ---- Integers, see int8.inc.h and groups.inc.h ---- */

typedef __m512i vec_i32;

static inline vec_i32 splat_i32(int32_t x) { return _mm512_set1_epi32(x); }
static inline vec_i32 add_i32(vec_i32 a, vec_i32 b) { return _mm512_add_epi32(a, b); }
static inline vec_i32 max_i32(vec_i32 a, vec_i32 b) { return _mm512_max_epi32(a, b); }
static inline vec_i32 bits_of(vec_f32 v) { return _mm512_castps_si512(v); }
static inline vec_f32 real_of(vec_i32 v) { return _mm512_cvtepi32_ps(v); }
static inline vec_i32 rounded(vec_f32 v) { return _mm512_cvtps_epi32(v); }
static inline vec_i32 without_sign(vec_i32 bits) { return _mm512_and_epi32(bits, _mm512_set1_epi32(0x7fffffff)); }

#ifdef MHA_VNNI /* multiplies unsigned bytes, here the weights, by signed ones */
typedef int8_t row_int;
enum { WEIGHT_OFFSET = 128 };

static inline void store_row(row_int *p, vec_i32 v)
{
    _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8(v));
}

static inline vec_i32 load_group(const int8_t *p) { return _mm512_loadu_si512(p); }

static inline vec_i32 add_products(vec_i32 c, vec_i32 a, vec_i32 b)
{
    c = _mm512_dpbusd_epi32(c, b, a);
    HOLD(c);
    return c;
}
#else
typedef int16_t row_int;
enum { WEIGHT_OFFSET = 0 };

static inline void store_row(row_int *p, vec_i32 v)
{
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(v));
}

static inline vec_i32 load_group(const int8_t *p)
{
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

static inline vec_i32 add_products(vec_i32 c, vec_i32 a, vec_i32 b)
{
    c = _mm512_add_epi32(c, _mm512_madd_epi16(a, b));
    HOLD(c);
    return c;
}
#endif

#endif
