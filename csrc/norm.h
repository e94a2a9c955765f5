/* SPDX-License-Identifier: Apache-2.0
 *
 * norm.h - torch's layer_norm and rms_norm: rows normalized over their features.
 */
#ifndef MHA_NORM_H
#define MHA_NORM_H

#include "base.h"

typedef struct {
    mha_dtype dtype;
    /* x (axes..., width), read in place: features are adjacent and aligned. Distances are multiples of the size of a
     * number. They may be negative or zero. */
    size_t axes;
    const size_t *length;      /* [axes] */
    const ptrdiff_t *distance; /* [axes], in bytes */
    size_t width;
    const void *x;
    mha_norm norm;
    void *y; /* C-contiguous (axes..., width); it overlaps nothing else */

    size_t threads; /* at least 1 */
    mha_stop stop;
} mha_norm_call;

/* About how many floating-point operations a call takes, as mha_forward_operations(). */
double mha_norm_operations(const mha_norm_call *call);

/* Needs no memory: the status is MHA_OK or MHA_STOPPED. */
mha_status mha_apply_norm(const mha_norm_call *call);

#endif
