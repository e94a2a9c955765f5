/* SPDX-License-Identifier: Apache-2.0
 *
 * simd_avx2.h - the vector vocabulary (see simd.h) for x86-64 with AVX2, FMA and F16C: 16 registers of 32 bytes.
 */
#ifndef MHA_SIMD_AVX2_H
#define MHA_SIMD_AVX2_H

#include "simd.h"

#define REGISTERS 16
#define HOLD(v) __asm__("" : "+x"(v))
enum { lanes_f32 = 8, lanes_f64 = 4 };
typedef __m256 vec_f32;
typedef __m256d vec_f64;

static inline vec_f32 load_f32(const float *p) { return _mm256_loadu_ps(p); }
static inline vec_f64 load_f64(const double *p) { return _mm256_loadu_pd(p); }
static inline void store_f32(float *p, vec_f32 v) { _mm256_storeu_ps(p, v); }
static inline void store_f64(double *p, vec_f64 v) { _mm256_storeu_pd(p, v); }
static inline vec_f32 broadcast_f32(const float *p) { return _mm256_broadcast_ss(p); }
static inline vec_f64 broadcast_f64(const double *p) { return _mm256_broadcast_sd(p); }
static inline vec_f32 splat_f32(float x) { return _mm256_set1_ps(x); }
static inline vec_f64 splat_f64(double x) { return _mm256_set1_pd(x); }
static inline vec_f32 fma_f32(vec_f32 a, vec_f32 b, vec_f32 c) { return _mm256_fmadd_ps(a, b, c); }
static inline vec_f64 fma_f64(vec_f64 a, vec_f64 b, vec_f64 c) { return _mm256_fmadd_pd(a, b, c); }
static inline vec_f32 max_f32(vec_f32 a, vec_f32 b) { return _mm256_max_ps(a, b); }
static inline vec_f64 max_f64(vec_f64 a, vec_f64 b) { return _mm256_max_pd(a, b); }

static inline vec_f32 power_f32(vec_f32 v)
{
    const __m256i eight = _mm256_loadu_si256((const __m256i *)(const void *)mha_powers);
    const __m256i k = _mm256_castps_si256(v), rest = _mm256_permutevar8x32_epi32(eight, k);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(k, 20), rest));
}

static inline vec_f64 power_f64(vec_f64 v)
{
    return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(v), 52));
}

static inline vec_f32 zero_below_f32(vec_f32 v, vec_f32 t, vec_f32 x)
{
    return _mm256_andnot_ps(_mm256_cmp_ps(t, x, _CMP_LT_OQ), v);
}

static inline vec_f64 zero_below_f64(vec_f64 v, vec_f64 t, vec_f64 x)
{
    return _mm256_andnot_pd(_mm256_cmp_pd(t, x, _CMP_LT_OQ), v);
}

static inline vec_f32 either_f32(vec_f32 a, vec_f32 b) { return _mm256_or_ps(a, b); }
static inline vec_f64 either_f64(vec_f64 a, vec_f64 b) { return _mm256_or_pd(a, b); }
static inline vec_f32 unlike_f32(vec_f32 a, vec_f32 b) { return _mm256_xor_ps(a, b); }
static inline vec_f64 unlike_f64(vec_f64 a, vec_f64 b) { return _mm256_xor_pd(a, b); }

static inline vec_f32 hide_f32(vec_f32 words, size_t i)
{
    const __m256i bit = _mm256_set1_epi32((int)(1u << i));
    const __m256i is_set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_castps_si256(words), bit), bit);
    return _mm256_and_ps(_mm256_castsi256_ps(is_set), _mm256_set1_ps(-INFINITY));
}

static inline vec_f64 hide_f64(vec_f64 words, size_t i)
{
    const __m256i bit = _mm256_set1_epi64x((long long)(1ull << i));
    const __m256i is_set = _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_castpd_si256(words), bit), bit);
    return _mm256_and_pd(_mm256_castsi256_pd(is_set), _mm256_set1_pd(-INFINITY));
}

static inline uint64_t nonzero(const char *p)
{
    const __m128i is_zero = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)(const void *)p), _mm_setzero_si128());
    return (uint64_t)_mm_movemask_epi8(is_zero) ^ 0xffff;
}

/* The pattern of a shuffle that puts zeros below halves. */
static const int8_t above_zeros[32] = {-1, -1, 0, 1, -1, -1, 2,  3,  -1, -1, 4,  5,  -1, -1, 6,  7,
                                       -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15};

static inline vec_f32 widen_bf16(const uint16_t *p)
{
    const __m256i pattern = _mm256_loadu_si256((const __m256i *)(const void *)above_zeros);
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)p));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, pattern));
}

/* The pattern stays in memory. */
#define WIDEN_BF16_TIGHT widen_bf16_tight
static inline vec_f32 widen_bf16_tight(const uint16_t *p)
{
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)p));
    __m256i wide;
    __asm__("vpshufb %2, %1, %0" : "=x"(wide) : "x"(twice), "m"(*(const __m256i *)(const void *)above_zeros));
    return _mm256_castsi256_ps(wide);
}

static inline vec_f32 widen_f16(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}

static inline vec_f32 round_bf16(vec_f32 v)
{
    const __m256i x = _mm256_castps_si256(v), is_odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_add_epi32(x, _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_blendv_epi8(nearest, quiet, is_nan), upper));
}

static inline void narrow_bf16(uint16_t *p, vec_f32 v)
{
    const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(round_bf16(v)), 16);
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
    _mm_storeu_si128((__m128i *)(void *)p, halves);
}

static inline vec_f32 swap_neighbours(vec_f32 v) { return _mm256_permute_ps(v, 0xb1); }

static inline void narrow_f16(uint16_t *p, vec_f32 v)
{
    const __m128i halves = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128((__m128i *)(void *)p, halves);
}

static inline void transpose_f64(vec_f64 v[4])
{
    const vec_f64 a = _mm256_unpacklo_pd(v[0], v[1]), b = _mm256_unpackhi_pd(v[0], v[1]);
    const vec_f64 c = _mm256_unpacklo_pd(v[2], v[3]), d = _mm256_unpackhi_pd(v[2], v[3]);
    v[0] = _mm256_permute2f128_pd(a, c, 0x20);
    v[1] = _mm256_permute2f128_pd(b, d, 0x20);
    v[2] = _mm256_permute2f128_pd(a, c, 0x31);
    v[3] = _mm256_permute2f128_pd(b, d, 0x31);
}

static inline void transpose_f32(vec_f32 v[8])
{
    vec_f32 pair[8], quad[8];
    MHA_UNROLL
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    MHA_UNROLL
    for (int i = 0; i < 8; i += 4)
        MHA_UNROLL
        for (int j = 0; j < 2; j++) {
            quad[i + 2 * j] = _mm256_shuffle_ps(pair[i + j], pair[i + j + 2], 0x44);
            quad[i + 2 * j + 1] = _mm256_shuffle_ps(pair[i + j], pair[i + j + 2], 0xee);
        }
    MHA_UNROLL
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
    }
}

/* ---- Integers, see int8.inc.h and groups.inc.h ---- */

typedef __m256i vec_i32;
typedef int16_t row_int;
enum { WEIGHT_OFFSET = 0 };

static inline vec_i32 splat_i32(int32_t x) { return _mm256_set1_epi32(x); }
static inline vec_i32 add_i32(vec_i32 a, vec_i32 b) { return _mm256_add_epi32(a, b); }
static inline vec_i32 max_i32(vec_i32 a, vec_i32 b) { return _mm256_max_epi32(a, b); }
static inline vec_i32 bits_of(vec_f32 v) { return _mm256_castps_si256(v); }
static inline vec_f32 real_of(vec_i32 v) { return _mm256_cvtepi32_ps(v); }
static inline vec_i32 rounded(vec_f32 v) { return _mm256_cvtps_epi32(v); }
static inline vec_i32 without_sign(vec_i32 bits) { return _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)); }

static inline void store_row(row_int *p, vec_i32 v)
{
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storeu_si128((__m128i *)(void *)p, half);
}

static inline vec_i32 load_group(const int8_t *p)
{
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)p));
}

static inline vec_i32 add_products(vec_i32 c, vec_i32 a, vec_i32 b)
{
    const vec_i32 products = _mm256_madd_epi16(a, b);
    __asm__("vpaddd %1, %0, %0" : "+x"(c) : "x"(products)); /* gcc would add in another register, and copy */
    return c;
}

#endif
