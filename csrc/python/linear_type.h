/* SPDX-License-Identifier: Apache-2.0
 *
 * linear_type.h - Linear: the Python object that owns a packed linear map; and the parts of a feed-forward network.
 */
#ifndef MHA_PYTHON_LINEAR_TYPE_H
#define MHA_PYTHON_LINEAR_TYPE_H

#include "module.h"

/* Immutable, so that any number of calls may use it at the same time. */
typedef struct {
    PyObject_HEAD
    mha_linear *packed;
    mha_dtype dtype;
    npy_intp features, depth;
    Py_ssize_t nbytes; /* of the parameters that it was made from */
} linear_object;

extern PyType_Spec linear_type_spec;

/* *activation = what a name stands for. Returns 0, or -1 with an exception. */
int collect_activation(PyObject *object, mha_activation *activation);

/* linear(weights, input) and activate(input, activation, is_gated), functions of the module. */
PyObject *linear(PyObject *module, PyObject *const *objects, Py_ssize_t count);
PyObject *activate(PyObject *module, PyObject *const *objects, Py_ssize_t count);

#endif
