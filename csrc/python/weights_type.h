/* SPDX-License-Identifier: Apache-2.0
 *
 * weights_type.h - Weights: the Python object that owns one packed set of parameters.
 */
#ifndef MHA_PYTHON_WEIGHTS_TYPE_H
#define MHA_PYTHON_WEIGHTS_TYPE_H

#include "module.h"

/* Immutable once made, so that any number of calls may use it at once. */
typedef struct {
    PyObject_HEAD
    mha_weights *packed;
    PyObject *k_weight; /* what packed refers to, */
    PyObject *pins;     /* and what keeps its memory where it is */
    mha_widths widths;
    mha_dtype dtype;
    bool has_bias_kv;
    size_t nbytes; /* of the parameters it was made from */
} weights_object;

extern PyType_Spec weights_type_spec;

#endif
