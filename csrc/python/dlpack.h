/* SPDX-License-Identifier: Apache-2.0
 *
 * dlpack.h - bfloat16 through DLPack, the one type that NumPy cannot read.
 */
#ifndef MHA_PYTHON_DLPACK_H
#define MHA_PYTHON_DLPACK_H

#include "module.h"

/* A new array over the memory of an object that exposes bfloat16 on the CPU through DLPack. To be called with the
 * exception of NumPy, which could not read the object. The exception stays if the object does not expose bfloat16. */
PyObject *bfloat16_from_dlpack(const module_state *state, PyObject *object, const char *name);

#endif
