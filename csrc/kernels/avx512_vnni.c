/* SPDX-License-Identifier: Apache-2.0
 *
 * avx512_vnni.c - the kernels of int8.inc.h over the vocabulary of simd_avx512.h, with AVX512_VNNI.
 */
#include <math.h>
#include <string.h>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,fma")
#endif
#define MHA_VNNI
#include "simd_avx512.h"

#include "int8.inc.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const mha_narrow_kernels mha_int8_avx512_vnni = MHA_INT8_KERNELS;
#endif
