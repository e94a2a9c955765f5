/* SPDX-License-Identifier: Apache-2.0
 *
 * halves.inc.h - numbers of 16 bits to float32 and back (kernels.inc.h includes it).
 */

#ifndef MHA_HALVES_INC_H
#define MHA_HALVES_INC_H

/* One vector. `type` is a constant in every copy of this and of the next three. */
INLINE void widen_vector(const mha_dtype type, const uint16_t *from, float *to)
{
    store_f32(to, type == MHA_BFLOAT16 ? widen_bf16(from) : widen_f16(from));
}

INLINE void narrow_vector(const mha_dtype type, vec_f32 from, uint16_t *to)
{
    if (type == MHA_BFLOAT16)
        narrow_bf16(to, from);
    else
        narrow_f16(to, from);
}

INLINE void widen_all(const mha_dtype type, const uint16_t *from, size_t n, float *to)
{
    size_t i = 0;
    for (; i + lanes_f32 <= n; i += lanes_f32)
        widen_vector(type, from + i, to + i);
    if (i < n) {
        uint16_t last[lanes_f32] = {0};
        float wide[lanes_f32];
        memcpy(last, from + i, (n - i) * sizeof *from);
        widen_vector(type, last, wide);
        memcpy(to + i, wide, (n - i) * sizeof *to);
    }
}

INLINE void narrow_all(const mha_dtype type, const float *from, size_t n, uint16_t *to)
{
    size_t i = 0;
    for (; i + lanes_f32 <= n; i += lanes_f32)
        narrow_vector(type, load_f32(from + i), to + i);
    if (i < n) {
        uint16_t halves[lanes_f32];
        narrow_vector(type, load_some(from + i, n - i), halves);
        memcpy(to + i, halves, (n - i) * sizeof *to);
    }
}

static void widen(mha_dtype type, const void *halves, size_t n, void *numbers)
{
    if (type == MHA_BFLOAT16)
        widen_all(MHA_BFLOAT16, halves, n, numbers);
    else
        widen_all(MHA_FLOAT16, halves, n, numbers);
}

static void narrow(mha_dtype type, const void *numbers, size_t n, void *halves)
{
    if (type == MHA_BFLOAT16)
        narrow_all(MHA_BFLOAT16, numbers, n, halves);
    else
        narrow_all(MHA_FLOAT16, numbers, n, halves);
}

#endif
