/* SPDX-License-Identifier: Apache-2.0
 *
 * sdpa.h - scaled_dot_product_attention(), from Python objects to the core and back.
 */
#ifndef MHA_PYTHON_SDPA_H
#define MHA_PYTHON_SDPA_H

#include "module.h"

/* Its positional arguments: their numbers, and their names in its signature. */
#define SDPA_ARGUMENTS(X) \
    X(QUERY, query) X(KEY, key) X(VALUE, value) X(ATTN_MASK, attn_mask) X(DROPOUT_P, dropout_p) \
    X(IS_CAUSAL, is_causal) X(SCALE, scale) X(ENABLE_GQA, enable_gqa) X(DROPOUT_SEED, dropout_seed) X(OUT, out)

/* Module function. */
PyObject *scaled_dot_product_attention(PyObject *module, PyObject *const *objects, Py_ssize_t count);

#endif
