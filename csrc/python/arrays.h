/* SPDX-License-Identifier: Apache-2.0
 *
 * arrays.h - arrays as the binding sees them: where they come from, what they hold, where they are in memory.
 */
#ifndef MHA_PYTHON_ARRAYS_H
#define MHA_PYTHON_ARRAYS_H

#include "module.h"

/* A new reference to the array that an object is or exposes (array interface, __array__, buffer protocol or DLPack). It
 * is of the base class and in native byte order. It shares the memory unless the byte order had to change. */
PyArrayObject *array_from_object(const module_state *state, PyObject *object, const char *name);

/* Whether the array holds the numbers of a layer of this dtype. */
bool array_has_dtype(PyArrayObject *array, mha_dtype dtype);

/* Whether it holds floating-point numbers of any width, including registered types such as bfloat16. */
bool array_is_floating(PyArrayObject *array);

/* As array_from_object(). Floating-point numbers that the core does not read are cast: half to float32, long double to
 * float64. */
PyArrayObject *mask_from_object(const module_state *state, PyObject *object, const char *name);

/* The kind of a mask from mask_from_object(). bool is taken as HIDE. */
mha_mask_kind mask_kind(PyArrayObject *mask);

/* The name of the dtype in torch's messages: "Float", "Double" and so on. NumPy's name if torch has no such dtype. */
const char *torch_type_name(PyArrayObject *array);

bool array_has_shape(PyArrayObject *array, int ndim, const npy_intp *shape);

/* A new list of a shape's sizes, which prints as torch's shapes do in most messages. */
PyObject *shape_as_list(int ndim, const npy_intp *shape);

/* Whether the memory of two arrays, from the first to the last byte, may overlap. False if one is NULL. */
bool arrays_may_overlap(PyArrayObject *a, PyArrayObject *b);

/* The array that is given as out=, a borrowed reference; NULL for None. The exceptions of both functions are those of
 * NumPy's ufuncs: TypeError for an object that is not an array or a wrong dtype, ValueError for a read-only array or a
 * wrong shape. */
int out_from_object(PyObject *object, PyArrayObject **out);
int check_out(PyArrayObject *out, mha_dtype dtype, int ndim, const npy_intp *shape);

/* Copies a result to out, unless out is NULL or the result itself. Returns out, or the result if out is NULL: a borrowed
 * reference. NULL with an exception if copying fails. */
PyArrayObject *copy_to_out(PyArrayObject *result, PyArrayObject *out);

/* A new C-contiguous array. Raises MemoryError for a shape beyond all memory, for which NumPy raises ValueError. */
PyArrayObject *new_array(int ndim, const npy_intp *shape, mha_dtype dtype);

#endif
