/* SPDX-License-Identifier: Apache-2.0
 *
 * thread_count.h - how many threads a call may use, and who decides it.
 *
 * In order: the context variable num_threads, set_num_threads(), MHA_C_NUM_THREADS, OMP_NUM_THREADS, the CPUs that
 * this process may use.
 */
#ifndef MHA_PYTHON_THREAD_COUNT_H
#define MHA_PYTHON_THREAD_COUNT_H

#include "module.h"

/* Reads the environment and makes the context variable: 0, or -1 with an ImportError. */
int thread_count_init(module_state *state);

/* At least 1; 0 with an exception when the context variable holds something else than a number of threads. */
size_t thread_count(module_state *state);

/* Module functions. */
PyObject *set_num_threads(PyObject *module, PyObject *n);
PyObject *get_num_threads(PyObject *module, PyObject *no_arguments);

#endif
