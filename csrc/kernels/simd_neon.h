/* SPDX-License-Identifier: Apache-2.0
 *
 * simd_neon.h - the vector vocabulary (see simd.h) for aarch64: 32 registers of 16 bytes.
 */
#ifndef MHA_SIMD_NEON_H
#define MHA_SIMD_NEON_H

#include "simd.h"

#define REGISTERS 32
#define HOLD(v) __asm__("" : "+w"(v))
enum { lanes_f32 = 4, lanes_f64 = 2 };
typedef float32x4_t vec_f32;
typedef float64x2_t vec_f64;

static inline vec_f32 load_f32(const float *p) { return vld1q_f32(p); }
static inline vec_f64 load_f64(const double *p) { return vld1q_f64(p); }
static inline void store_f32(float *p, vec_f32 v) { vst1q_f32(p, v); }
static inline void store_f64(double *p, vec_f64 v) { vst1q_f64(p, v); }

/* The number stays in lane 0 of a register, where FMAs take it. ld1r, which fills all lanes, takes the turn of an FMA. */
static inline vec_f32 broadcast_f32(const float *p)
{
    float x = *p;
    HOLD(x);
    return vdupq_n_f32(x);
}

static inline vec_f64 broadcast_f64(const double *p)
{
    double x = *p;
    HOLD(x);
    return vdupq_n_f64(x);
}

static inline vec_f32 splat_f32(float x) { return vdupq_n_f32(x); }
static inline vec_f64 splat_f64(double x) { return vdupq_n_f64(x); }
static inline vec_f32 fma_f32(vec_f32 a, vec_f32 b, vec_f32 c) { return vfmaq_f32(c, a, b); }
static inline vec_f64 fma_f64(vec_f64 a, vec_f64 b, vec_f64 c) { return vfmaq_f64(c, a, b); }
static inline vec_f32 max_f32(vec_f32 a, vec_f32 b) { return vmaxq_f32(a, b); }
static inline vec_f64 max_f64(vec_f64 a, vec_f64 b) { return vmaxq_f64(a, b); }

static inline vec_f32 power_f32(vec_f32 v)
{
    const uint8x16x2_t eight = vld1q_u8_x2((const uint8_t *)mha_powers);
    const uint32x4_t k = vreinterpretq_u32_f32(v), j = vandq_u32(k, vdupq_n_u32(7));
    const uint32x4_t bytes = vmlaq_u32(vdupq_n_u32(0x03020100), j, vdupq_n_u32(0x04040404)); /* 4 j to 4 j + 3 */
    const uint32x4_t rest = vreinterpretq_u32_u8(vqtbl2q_u8(eight, vreinterpretq_u8_u32(bytes)));
    return vreinterpretq_f32_u32(vaddq_u32(vshlq_n_u32(k, 20), rest));
}

static inline vec_f64 power_f64(vec_f64 v)
{
    return vreinterpretq_f64_s64(vshlq_n_s64(vreinterpretq_s64_f64(v), 52));
}

static inline vec_f32 zero_below_f32(vec_f32 v, vec_f32 t, vec_f32 x)
{
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vcltq_f32(t, x)));
}

static inline vec_f64 zero_below_f64(vec_f64 v, vec_f64 t, vec_f64 x)
{
    return vreinterpretq_f64_u64(vbicq_u64(vreinterpretq_u64_f64(v), vcltq_f64(t, x)));
}

static inline vec_f32 either_f32(vec_f32 a, vec_f32 b)
{
    return vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
}

static inline vec_f64 either_f64(vec_f64 a, vec_f64 b)
{
    return vreinterpretq_f64_u64(vorrq_u64(vreinterpretq_u64_f64(a), vreinterpretq_u64_f64(b)));
}

static inline vec_f32 unlike_f32(vec_f32 a, vec_f32 b)
{
    return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
}

static inline vec_f64 unlike_f64(vec_f64 a, vec_f64 b)
{
    return vreinterpretq_f64_u64(veorq_u64(vreinterpretq_u64_f64(a), vreinterpretq_u64_f64(b)));
}

static inline vec_f32 hide_f32(vec_f32 words, size_t i)
{
    const uint32x4_t is_set = vtstq_u32(vreinterpretq_u32_f32(words), vdupq_n_u32(1u << i));
    return vreinterpretq_f32_u32(vandq_u32(is_set, vreinterpretq_u32_f32(vdupq_n_f32(-INFINITY))));
}

static inline vec_f64 hide_f64(vec_f64 words, size_t i)
{
    const uint64x2_t is_set = vtstq_u64(vreinterpretq_u64_f64(words), vdupq_n_u64((uint64_t)1 << i));
    return vreinterpretq_f64_u64(vandq_u64(is_set, vreinterpretq_u64_f64(vdupq_n_f64(-INFINITY))));
}

static inline uint64_t nonzero(const char *p)
{
    const uint8x8_t bit = {1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t bytes = vld1q_u8((const uint8_t *)p);
    const uint8x16_t bits = vandq_u8(vtstq_u8(bytes, bytes), vcombine_u8(bit, bit));
    return vaddv_u8(vget_low_u8(bits)) | (uint64_t)vaddv_u8(vget_high_u8(bits)) << 8;
}

static inline vec_f32 widen_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
static inline vec_f32 widen_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

static inline vec_f32 round_bf16(vec_f32 v)
{
    const uint32x4_t x = vreinterpretq_u32_f32(v), is_odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
    const uint32x4_t nearest = vaddq_u32(x, vaddq_u32(is_odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(x, vdupq_n_u32(0x400000));
    const uint32x4_t rounded = vbslq_u32(vceqq_f32(v, v), nearest, quiet);
    return vreinterpretq_f32_u32(vandq_u32(rounded, vdupq_n_u32(0xffff0000)));
}

static inline void narrow_bf16(uint16_t *p, vec_f32 v)
{
    vst1_u16(p, vshrn_n_u32(vreinterpretq_u32_f32(round_bf16(v)), 16));
}

static inline vec_f32 swap_neighbours(vec_f32 v) { return vrev64q_f32(v); }

static inline void narrow_f16(uint16_t *p, vec_f32 v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

static inline void transpose_f64(vec_f64 v[2])
{
    const vec_f64 a = vtrn1q_f64(v[0], v[1]);
    v[1] = vtrn2q_f64(v[0], v[1]);
    v[0] = a;
}

static inline void transpose_f32(vec_f32 v[4])
{
    const vec_f64 a = vreinterpretq_f64_f32(vtrn1q_f32(v[0], v[1])), b = vreinterpretq_f64_f32(vtrn2q_f32(v[0], v[1]));
    const vec_f64 c = vreinterpretq_f64_f32(vtrn1q_f32(v[2], v[3])), d = vreinterpretq_f64_f32(vtrn2q_f32(v[2], v[3]));
    v[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
    v[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
    v[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
    v[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}

/* ---- Integers, see int8.inc.h and groups.inc.h ---- */

typedef int32x4_t vec_i32;
typedef int8_t row_int;
enum { WEIGHT_OFFSET = 0 };

static inline vec_i32 splat_i32(int32_t x) { return vdupq_n_s32(x); }
static inline vec_i32 add_i32(vec_i32 a, vec_i32 b) { return vaddq_s32(a, b); }
static inline vec_i32 max_i32(vec_i32 a, vec_i32 b) { return vmaxq_s32(a, b); }
static inline vec_i32 bits_of(vec_f32 v) { return vreinterpretq_s32_f32(v); }
static inline vec_f32 real_of(vec_i32 v) { return vcvtq_f32_s32(v); }
static inline vec_i32 rounded(vec_f32 v) { return vcvtnq_s32_f32(v); }
static inline vec_i32 without_sign(vec_i32 bits) { return vandq_s32(bits, vdupq_n_s32(0x7fffffff)); }

static inline void store_row(row_int *p, vec_i32 v)
{
    const int16x4_t half = vmovn_s32(v);
    vst1_lane_s32((int32_t *)(void *)p, vreinterpret_s32_s8(vmovn_s16(vcombine_s16(half, half))), 0);
}

static inline vec_i32 load_group(const int8_t *p) { return vreinterpretq_s32_s8(vld1q_s8(p)); }

#ifdef MHA_DOTPROD
/* As assembly: clang 14 has vdotq_s32() only if the whole file may use it. */
static inline vec_i32 add_products(vec_i32 c, vec_i32 a, vec_i32 b)
{
    __asm__("sdot %0.4s, %2.16b, %1.4b[0]" : "+w"(c) : "w"(vgetq_lane_s32(a, 0)), "w"(b));
    return c;
}
#else
/* Two products of int8 fit into 16 bits. As assembly: clang would multiply first for several sums, and spill. */
static inline vec_i32 add_products(vec_i32 c, vec_i32 a, vec_i32 b)
{
    vec_i32 low, high;
    __asm__("smull %1.8h, %3.8b, %4.8b\n\t"
            "smull2 %2.8h, %3.16b, %4.16b\n\t"
            "addp %1.8h, %1.8h, %2.8h\n\t"
            "sadalp %0.4s, %1.8h"
            : "+w"(c), "=&w"(low), "=&w"(high)
            : "w"(a), "w"(b));
    return c;
}
#endif

#endif
