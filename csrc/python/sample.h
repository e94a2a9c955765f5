/* SPDX-License-Identifier: Apache-2.0
 *
 * sample.h - some numbers of some arrays, by which a change of them is noticed.
 */
#ifndef MHA_PYTHON_SAMPLE_H
#define MHA_PYTHON_SAMPLE_H

#include "module.h"

/* A module function: bytes, from a tuple of arrays. */
PyObject *sample(PyObject *module, PyObject *arrays);

#endif
