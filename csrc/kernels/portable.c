/* SPDX-License-Identifier: Apache-2.0
 *
 * portable.c - the kernels of kernels.inc.h, bf16.inc.h and int8.inc.h over the vocabulary of simd_portable.h.
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "../philox.h"
#include "kernels.h"

#include "simd_portable.h"

#define DTYPE f32
#define REAL float
#include "kernels.inc.h"

#define DTYPE f64
#define REAL double
#include "kernels.inc.h"

#include "bf16.inc.h"

#include "int8.inc.h"

const mha_kernels mha_kernels_portable[2] = {
    MHA_KERNELS("portable", f32, float, MHA_FLOAT32),
    MHA_KERNELS("portable", f64, double, MHA_FLOAT64),
};

const mha_narrow_kernels mha_bf16_portable = MHA_BF16_BY_FMA;
const mha_narrow_kernels mha_int8_portable = MHA_INT8_KERNELS;
