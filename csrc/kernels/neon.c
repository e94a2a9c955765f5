/* SPDX-License-Identifier: Apache-2.0
 *
 * neon.c - the kernels of kernels.inc.h, bf16.inc.h and int8.inc.h over the vocabulary of simd_neon.h.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "../philox.h"
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#ifndef __clang__ /* gcc would load the broadcasts too early, and spill sums for them */
#pragma GCC push_options
#pragma GCC optimize("no-schedule-insns")
#endif
#include "simd_neon.h"

#define DTYPE f32
#define REAL float
#include "kernels.inc.h"

#define DTYPE f64
#define REAL double
#include "kernels.inc.h"

#include "bf16.inc.h"

#include "int8.inc.h"

#ifndef __clang__
#pragma GCC pop_options
#endif

const mha_kernels mha_kernels_neon[2] = {
    MHA_KERNELS("neon", f32, float, MHA_FLOAT32),
    MHA_KERNELS("neon", f64, double, MHA_FLOAT64),
};

const mha_narrow_kernels mha_bf16_neon = MHA_BF16_BY_FMA;
const mha_narrow_kernels mha_int8_neon = MHA_INT8_KERNELS;
#endif
