/* SPDX-License-Identifier: Apache-2.0
 *
 * neon_dotprod.c - the kernels of int8.inc.h over the vocabulary of simd_neon.h, with dot products.
 */
#include <math.h>
#include <string.h>

#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#define MHA_DOTPROD
#include "simd_neon.h"

#include "int8.inc.h"

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const mha_narrow_kernels mha_int8_neon_dotprod = MHA_INT8_KERNELS;
#endif
