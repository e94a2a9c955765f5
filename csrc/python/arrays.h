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

/* *array = array_from_object(). Returns 0, or -1 with an exception. The second one leaves *array as it is for None. */
int collect_array(const module_state *state, PyObject *object, const char *name, PyArrayObject **array);
int collect_optional(const module_state *state, PyObject *object, const char *name, PyArrayObject **array);

/* Whether the array holds the numbers of a layer of this dtype. */
bool array_has_dtype(PyArrayObject *array, mha_dtype dtype);

/* Whether it holds the numbers of a layer at all, and then the dtype. */
bool find_dtype(PyArrayObject *array, mha_dtype *dtype);

/* The names of a dtype: "float32", and in torch's messages "Float". */
const char *dtype_name(mha_dtype dtype);
const char *torch_dtype_name(mha_dtype dtype);

/* The dtype that NumPy's stands for. Returns 0, or -1 with a TypeError. */
int dtype_of_descr(PyArray_Descr *descr, mha_dtype *dtype);

/* Whether it holds floating-point numbers of any width, including registered types such as bfloat16. */
bool array_is_floating(PyArrayObject *array);

/* As collect_optional(). Floating-point numbers that the core does not add to scores are cast: halves to float32, long
 * double to float64. */
int collect_mask(const module_state *state, PyObject *object, const char *name, PyArrayObject **mask);

/* The kind of a mask from collect_mask(). bool is taken as HIDE. */
mha_mask_kind mask_kind(PyArrayObject *mask);

/* The name of the dtype in torch's messages: "Float", "Double" and so on. NumPy's name if torch has no such dtype. */
const char *torch_type_name(PyArrayObject *array);

/* Its name in C++, as some of torch's messages have it. */
const char *cpp_type_name(PyArrayObject *array);

bool array_has_shape(PyArrayObject *array, int ndim, const npy_intp *shape);

/* Raises a ValueError: the array has another shape than this one. Returns -1. */
int raise_wrong_shape(PyArrayObject *array, const char *name, int ndim, const npy_intp *shape);

/* A new list of a shape's sizes, which prints as torch's shapes do in most messages. */
PyObject *shape_as_list(int ndim, const npy_intp *shape);

/* Takes a parameter: an array of the layer's dtype, C-contiguous, aligned and in native byte order. The reference is
 * borrowed. Returns 0, or -1 with a TypeError or ValueError. */
int parameter_from_object(PyObject *object, const char *name, mha_dtype dtype, PyArrayObject **array);

/* A weight matrix as a layer is given it: an array in the layer's dtype; or a tuple of an array of int8 and one of
 * float32, the scales of its rows; or a tuple of an array in the layer's dtype and what products read, "bfloat16" or
 * "float32". Products of an array alone read its dtype, or float32 if it is float16. References are borrowed. */
typedef struct {
    PyArrayObject *numbers, *scale; /* scale NULL: no int8 */
    bool is_bf16;
} weight_arrays;

/* Takes a weight matrix, as parameter_from_object() does a parameter. There is a scale for each row. */
int weight_from_object(PyObject *object, const char *name, mha_dtype dtype, weight_arrays *weight);

/* What the core reads of them. */
mha_weight weight_of(const weight_arrays *weight);

/* Bytes of their numbers as they are multiplied. */
Py_ssize_t weight_nbytes(const weight_arrays *weight);

/* Whether the memory of an array, from its first to its last byte, is apart from that of others, some of which may be
 * NULL. */
bool is_apart(PyArrayObject *array, PyArrayObject *const *others, size_t count);

/* The array that is given as out=, a borrowed reference; NULL for None. The exceptions of both functions are those of
 * NumPy's ufuncs: TypeError for an object that is not an array or a wrong dtype, ValueError for a read-only array or a
 * wrong shape. */
int out_from_object(const module_state *state, PyObject *object, PyArrayObject **out);
int check_out(PyArrayObject *out, mha_dtype dtype, int ndim, const npy_intp *shape);

/* A new reference to what the core reads of an array: a C-contiguous copy in float32 if it holds halves, otherwise the
 * array itself. NULL if the array is NULL, or with an exception. No Python code runs. */
PyArrayObject *as_computed(PyArrayObject *array);

/* Replaces each array by what the core reads of it. An array that stands there twice is widened once. Returns 0, or -1
 * with an exception. */
int take_computed(PyArrayObject **const *arrays, size_t count);

/* Copies a result to `out`, and returns a new reference to that. If `out` is NULL, the reference is to the result. NULL
 * with an exception. */
PyObject *handed_back(PyArrayObject *result, PyArrayObject *out);

/* The same of a result that becomes halves if `descr` is their dtype. */
PyObject *as_stored(PyArrayObject *result, PyArray_Descr *descr, PyArrayObject *out);

/* A new C-contiguous array of a NumPy type, a number. Raises MemoryError for a shape beyond all memory, for which NumPy
 * raises ValueError. */
PyArrayObject *new_stored_array(int ndim, const npy_intp *shape, int type);

/* The same of the type in which a dtype is computed. */
PyArrayObject *new_array(int ndim, const npy_intp *shape, mha_dtype dtype);

#endif
