/* SPDX-License-Identifier: Apache-2.0
 *
 * module.h - what the files of the extension module share: Python, NumPy's C-API and the state of the module.
 * Assumes: only this directory includes it. Only run.c defines MHA_IMPORT_NUMPY before.
 */
#ifndef MHA_PYTHON_MODULE_H
#define MHA_PYTHON_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <time.h>

/* Built with the headers of NumPy 2, the module runs with NumPy 1.26 and with NumPy 2. */
#define NPY_NO_DEPRECATED_API NPY_1_25_API_VERSION
#define NPY_TARGET_VERSION NPY_1_25_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL mha_numpy_api
#ifndef MHA_IMPORT_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "../mha.h"

typedef struct {
    PyTypeObject *weights_type, *linear_type, *advised_function_type;
    PyObject *from_dlpack; /* numpy.from_dlpack */
    PyObject *main_thread; /* threading.main_thread */
    PyObject *num_threads; /* the ContextVar */

    /* Interned names of attributes. */
    PyObject *array_name, *array_interface_name, *array_struct_name, *dlpack_name, *filled_name, *ident_name;

    size_t chosen_threads;      /* by set_num_threads(); 0: not set */
    size_t environment_threads; /* by MHA_C_NUM_THREADS or OMP_NUM_THREADS; 0: not set */
    size_t usable_cpus;         /* as of usable_cpus_time; 0: not known yet */
    double usable_cpus_time;
} module_state;

/* Whether an object is this text. */
static inline bool is_text(PyObject *object, const char *text)
{
    return PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, text) == 0;
}

/* Seconds on a clock that never goes back. */
static inline double monotonic_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

#endif
