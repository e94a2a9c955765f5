/* SPDX-License-Identifier: Apache-2.0
 *
 * norm.h - normalize(): torch's layer_norm and rms_norm, from Python objects to the core and back.
 */
#ifndef MHA_PYTHON_NORM_H
#define MHA_PYTHON_NORM_H

#include "module.h"

/* Its positional arguments: their numbers, and their names in its signature. */
#define NORM_ARGUMENTS(X) \
    X(INPUT, input) X(NORMALIZED_SHAPE, normalized_shape) X(WEIGHT, weight) X(BIAS, bias) X(EPS, eps) X(IS_RMS, is_rms)

/* Module function. */
PyObject *normalize(PyObject *module, PyObject *const *objects, Py_ssize_t count);

#endif
