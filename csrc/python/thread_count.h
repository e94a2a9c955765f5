/* SPDX-License-Identifier: Apache-2.0
 *
 * thread_count.h - how many threads a call may use, and who decides it.
 *
 * The first of these that is set decides: the context variable num_threads, set_num_threads(), MHA_C_NUM_THREADS,
 * OMP_NUM_THREADS, the number of CPUs that this process may use.
 */
#ifndef MHA_PYTHON_THREAD_COUNT_H
#define MHA_PYTHON_THREAD_COUNT_H

#include "module.h"

/* Reads the environment and makes the context variable. Returns 0, or -1 with an ImportError. */
int thread_count_init(module_state *state);

/* At least 1. Returns 0 with an exception if the context variable does not hold a number of threads. */
size_t thread_count(module_state *state);

/* Module functions. */
PyObject *set_num_threads(PyObject *module, PyObject *n);
PyObject *get_num_threads(PyObject *module, PyObject *no_arguments);

#endif
