/* SPDX-License-Identifier: Apache-2.0
 *
 * stages.h - the parts of a forward call, one by one, for mha_c.explain.
 */
#ifndef MHA_PYTHON_STAGES_H
#define MHA_PYTHON_STAGES_H

#include "module.h"

/* Module functions. All but project() take the arguments of forward(). */
PyObject *project(PyObject *module, PyObject *const *objects, Py_ssize_t count);
PyObject *scores(PyObject *module, PyObject *const *objects, Py_ssize_t count);
PyObject *attend(PyObject *module, PyObject *const *objects, Py_ssize_t count);
PyObject *takes_few_queries(PyObject *module, PyObject *const *objects, Py_ssize_t count);

#endif
