/* SPDX-License-Identifier: Apache-2.0
 *
 * weights_type.h - Weights: the Python object that owns one set of packed parameters.
 */
#ifndef MHA_PYTHON_WEIGHTS_TYPE_H
#define MHA_PYTHON_WEIGHTS_TYPE_H

#include "module.h"

/* Immutable, so that any number of calls may use it at the same time. */
typedef struct {
    PyObject_HEAD
    mha_layer *packed;
    PyObject *k_weight; /* the array that `packed` refers to; NULL: it is int8 */
    PyObject *pins;     /* keep its memory in place */
    mha_widths widths;
    mha_dtype dtype;
    PyArray_Descr *descr; /* the same for NumPy */
    bool has_bias_kv;
    Py_ssize_t nbytes; /* of the parameters that it was made from */
} weights_object;

extern PyType_Spec weights_type_spec;

#endif
