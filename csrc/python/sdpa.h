/* SPDX-License-Identifier: Apache-2.0
 *
 * sdpa.h - scaled_dot_product_attention(), from Python objects to the core and back.
 */
#ifndef MHA_PYTHON_SDPA_H
#define MHA_PYTHON_SDPA_H

#include "module.h"

/* Module function. */
PyObject *scaled_dot_product_attention(PyObject *module, PyObject *const *objects, Py_ssize_t count);

#endif
