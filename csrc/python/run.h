/* SPDX-License-Identifier: Apache-2.0
 *
 * run.h - from Python to the core and back: the GIL, threads, signals, pinned memory, and what a status means.
 */
#ifndef MHA_PYTHON_RUN_H
#define MHA_PYTHON_RUN_H

#include "module.h"

/* Loads NumPy's C-API, which all files share. Returns 0, or -1 with an exception. */
int import_numpy(void);

/* Raises the exception that a status stands for. 0 for MHA_OK, otherwise -1. */
int raise_status(mha_status status);

/* Packing weights touches every number once. With more numbers than this, other threads may run meanwhile. */
enum { PACK_WITHOUT_GIL = 1 << 16 };

/* Sets the attribute `refused` of the current exception: it is about the arguments, and nothing was computed. */
void mark_refused(void);

/* Runs start(call), which takes about `operations` operations. If it takes long, it runs without the GIL, and with
 * *threads and *stop set, which belong to the call. `arrays` (NULL: none) are all arrays whose memory the call uses.
 * The caller holds references to them. Returns 0, or -1 with an exception. */
int run_core(module_state *state, double operations, size_t *threads, mha_stop *stop, PyArrayObject *const *arrays,
             size_t count, mha_status (*start)(const void *call), const void *call);

/* A new reference that keeps the memory of some arrays in place, or NULL with an exception. An array may be NULL. A
 * reference to the array would not do: resize(refcheck=False) ignores references, but refuses an array with a weak
 * reference. */
PyObject *pin_memory(PyArrayObject *const *arrays, size_t count);

#endif
