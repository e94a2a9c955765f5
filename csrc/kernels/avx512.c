/* SPDX-License-Identifier: Apache-2.0
 *
 * avx512.c - the kernels of kernels.inc.h, bf16.inc.h and int8.inc.h over the vocabulary of simd_avx512.h.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "../philox.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,fma")
#endif
#include "simd_avx512.h"

#define DTYPE f32
#define REAL float
#include "kernels.inc.h"

#define DTYPE f64
#define REAL double
#include "kernels.inc.h"

#include "bf16.inc.h"

#include "int8.inc.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const mha_kernels mha_kernels_avx512[2] = {
    MHA_KERNELS("avx512", f32, float, MHA_FLOAT32),
    MHA_KERNELS("avx512", f64, double, MHA_FLOAT64),
};

const mha_narrow_kernels mha_bf16_avx512 = MHA_BF16_BY_FMA;
const mha_narrow_kernels mha_int8_avx512 = MHA_INT8_KERNELS;
#endif
