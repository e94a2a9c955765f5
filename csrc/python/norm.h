/* SPDX-License-Identifier: Apache-2.0
 *
 * norm.h - normalize(): torch's layer_norm and rms_norm, from Python objects to the core and back.
 */
#ifndef MHA_PYTHON_NORM_H
#define MHA_PYTHON_NORM_H

#include "module.h"

/* Module function. */
PyObject *normalize(PyObject *module, PyObject *const *objects, Py_ssize_t count);

#endif
