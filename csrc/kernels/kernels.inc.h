/* SPDX-License-Identifier: Apache-2.0
 *
 * kernels.inc.h - the kernels, written once over the vocabulary of simd.h. kernels.h says what each function does.
 *
 * Only the part above VEC is guarded. The file of an instruction set opens a target region and includes this file once
 * per dtype, after defining
 *   DTYPE     f32 or f64, the suffix of every name of the vocabulary
 *   REAL      float or double
 * Both are undefined at the end. MHA_KERNELS() initialises the table of a dtype. setuptools has no flags per source, so
 * these files need target regions: headers of the system and of the core come before the region, and everything in it
 * is static.
 *
 * Every operation on lanes comes from the vocabulary, or is + - * /, which -ffp-contract=off keeps from being fused. So
 * all instruction sets with a true fma give equal bits.
 */

#ifndef MHA_KERNELS_INC_H
#define MHA_KERNELS_INC_H

#include "tiles.h"

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define V(name) PASTE(name, DTYPE)

enum { VECTORS = 3 }; /* of a panel, at most */

#define LOWEST_f32 (-FLT_MAX)
#define LOWEST_f64 (-DBL_MAX)

#define MHA_KERNELS(isa, suffix, real, kind) \
    { \
        .name = isa, .dtype = kind, .size = sizeof(real), .lanes = PASTE(lanes, suffix), .vectors = VECTORS, \
        .product = PASTE(product, suffix), .pack_panel = PASTE(pack_panel, suffix), \
        .unpack_panel = PASTE(unpack_panel, suffix), .read_masks = PASTE(read_masks, suffix), \
        .hide = PASTE(hide_scores, suffix), .add_visible = PASTE(add_visible, suffix), \
        .softmax_begin = PASTE(softmax_begin, suffix), .softmax_step = PASTE(softmax_step, suffix), \
        .softmax_merge = PASTE(softmax_merge, suffix), \
        .softmax_probabilities = PASTE(softmax_probabilities, suffix), .softmax_end = PASTE(softmax_end, suffix), \
        .add = PASTE(add, suffix), .fill = PASTE(fill, suffix), .is_finite = PASTE(is_finite, suffix), \
        .dropout = PASTE(dropout, suffix), .attend_handful = PASTE(attend_handful, suffix), \
        .normalize = PASTE(normalize, suffix), .widen = widen, .narrow = narrow, .activate = PASTE(activate, suffix), \
    }

#endif

#define VEC V(vec)
#define LANES ((size_t)V(lanes))

_Static_assert(LANES <= MHA_MAX_VECTOR_LANES && VECTORS * LANES <= MHA_MAX_LANES, "arrays are that long");
_Static_assert(MHA_BLOCK_KEYS % LANES == 0, "a row of a block of masks is whole vectors");

#include "tile.inc.h"

#include "panels.inc.h"

#include "masks.inc.h"

#include "softmax.inc.h"

#include "rows.inc.h"

#include "handful.inc.h"

#include "norm.inc.h"

#include "activations.inc.h"

#include "halves.inc.h"

#undef LANES
#undef VEC
#undef DTYPE
#undef REAL
