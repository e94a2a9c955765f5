/* SPDX-License-Identifier: Apache-2.0
 *
 * arrays.h - arrays as the binding sees them: where they come from, what they hold, where they lie in memory.
 */
#ifndef MHA_PYTHON_ARRAYS_H
#define MHA_PYTHON_ARRAYS_H

#include "module.h"

/* A new reference to the array that an object is or exposes (array interface, __array__, buffer protocol or DLPack),
 * of the base class and in native byte order. Memory is shared unless the byte order had to change. */
PyArrayObject *array_from_object(const module_state *state, PyObject *object, const char *name);

/* Whether the array holds the numbers of a layer of this dtype. */
bool array_has_dtype(PyArrayObject *array, mha_dtype dtype);

/* Whether it holds floating-point numbers of any width, those of registered types (bfloat16) included. */
bool array_is_floating(PyArrayObject *array);

/* As array_from_object(); floating-point numbers that the core does not read are cast: half to float32, long double to
 * float64. */
PyArrayObject *mask_from_object(const module_state *state, PyObject *object, const char *name);

/* The kind of a mask from mask_from_object(), bool (taken as HIDE) or floating. */
mha_mask_kind mask_kind(PyArrayObject *mask);

/* "Float", "Double", ... as torch's messages say it; NumPy's name where torch has no such type. */
const char *torch_type_name(PyArrayObject *array);

bool array_has_shape(PyArrayObject *array, int ndim, const npy_intp *shape);

/* Whether the memory from the first to the last byte of one meets that of the other; NULL meets nothing. */
bool arrays_may_overlap(PyArrayObject *a, PyArrayObject *b);

/* The array that out= is, a borrowed reference; NULL for None. As with NumPy's ufuncs, TypeError for a thing or a dtype
 * that cannot be, ValueError for a read-only array or another shape. */
int out_from_object(PyObject *object, PyArrayObject **out);
int check_out(PyArrayObject *out, mha_dtype dtype, int ndim, const npy_intp *shape);

/* Hands a result over: copied to out, unless it lies there already or out is NULL. Returns out or else the result, a
 * borrowed reference, or NULL with an exception. */
PyArrayObject *copy_to_out(PyArrayObject *result, PyArrayObject *out);

/* A new reference that keeps the memory of some arrays (NULL: none) where it is, or NULL with an exception. A reference
 * to an array is not enough: resize(refcheck=False) asks for none, but leaves an array alone that has a weak one. */
PyObject *pin_memory(PyArrayObject *const *arrays, size_t count);

/* A new C-contiguous array; MemoryError where NumPy says ValueError, for a shape beyond all memory. */
PyArrayObject *new_array(int ndim, const npy_intp *shape, mha_dtype dtype);

#endif
