/* SPDX-License-Identifier: Apache-2.0
 *
 * sample.c - some numbers of some arrays, by which a change of them is noticed.
 *
 * Owns: nothing. Takes up to 64 numbers of each array, whatever its strides, so that it costs the same for all sizes.
 *
 *     32 from the first number on, along the diagonal        * . . . o     o . . * .
 *     32 from the last number back, along the other one      . * . o .  or . o * . .   (rows of different lengths)
 */
#include "sample.h"

#include <string.h>

#include "arrays.h"

enum { MAX_RUN = 32 };

/* How many numbers one diagonal has. */
static npy_intp run_length(PyArrayObject *array)
{
    npy_intp length = PyArray_SIZE(array) > 0 ? 1 : 0;
    for (int axis = 0; length > 0 && axis < PyArray_NDIM(array); axis++)
        if (PyArray_DIM(array, axis) > length)
            length = PyArray_DIM(array, axis);
    return length < MAX_RUN ? length : MAX_RUN;
}

/* How far one step of a diagonal goes along an axis. */
static npy_intp step_along(PyArrayObject *array, int axis, npy_intp length)
{
    return length > 1 ? (PyArray_DIM(array, axis) - 1) / (length - 1) : 0;
}

/* memcpy() of the sizes that compilers can see. */
static void copy_number(char *to, const char *from, size_t size)
{
    if (size == sizeof(float))
        memcpy(to, from, sizeof(float));
    else if (size == sizeof(double))
        memcpy(to, from, sizeof(double));
    else
        memcpy(to, from, size);
}

static void copy_diagonal(PyArrayObject *array, npy_intp length, char *to)
{
    const size_t size = (size_t)PyArray_ITEMSIZE(array);
    const char *from = PyArray_BYTES(array);
    npy_intp stride = 0;
    for (int axis = 0; axis < PyArray_NDIM(array); axis++)
        stride += step_along(array, axis, length) * PyArray_STRIDE(array, axis);
    for (npy_intp i = 0; i < length; i++)
        copy_number(to + (size_t)i * size, from + i * stride, size);
}

/* Up the rows, while the columns go on, and begin again where they end. */
static void copy_other_diagonal(PyArrayObject *array, npy_intp length, char *to)
{
    const size_t size = (size_t)PyArray_ITEMSIZE(array);
    const int last = PyArray_NDIM(array) - 1;
    const npy_intp columns = last < 0 ? 1 : PyArray_DIM(array, last);
    const npy_intp step = last < 0 ? 0 : step_along(array, last, length);
    const npy_intp column_stride = last < 0 ? 0 : PyArray_STRIDE(array, last);
    const char *row = PyArray_BYTES(array);
    npy_intp stride = 0, column = columns - 1;
    for (int axis = 0; axis < last; axis++) {
        row += (PyArray_DIM(array, axis) - 1) * PyArray_STRIDE(array, axis);
        stride += step_along(array, axis, length) * PyArray_STRIDE(array, axis);
    }
    for (npy_intp i = 0; i < length; i++) {
        copy_number(to + (size_t)i * size, row - i * stride + column * column_stride, size);
        column += step;
        column -= column >= columns ? columns : 0;
    }
}

static int check_arrays(PyObject *arrays)
{
    if (!PyTuple_Check(arrays)) {
        PyErr_Format(PyExc_TypeError, "sample expected a tuple of arrays, not %s", Py_TYPE(arrays)->tp_name);
        return -1;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arrays); i++) {
        PyObject *object = PyTuple_GET_ITEM(arrays, i);
        PyArrayObject *array = PyArray_Check(object) ? (PyArrayObject *)object : NULL;
        if (array == NULL || !(PyArray_ISNUMBER(array) || array_is_floating(array))) {
            PyErr_SetString(PyExc_TypeError, "sample expected arrays of numbers");
            return -1;
        }
    }
    return 0;
}

PyObject *sample(PyObject *module, PyObject *arrays)
{
    (void)module;
    if (check_arrays(arrays) < 0)
        return NULL;
    const Py_ssize_t count = PyTuple_GET_SIZE(arrays);
    Py_ssize_t nbytes = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyArrayObject *array = (PyArrayObject *)PyTuple_GET_ITEM(arrays, i);
        nbytes += 2 * run_length(array) * PyArray_ITEMSIZE(array);
    }
    PyObject *numbers = PyBytes_FromStringAndSize(NULL, nbytes);
    if (numbers == NULL)
        return NULL;
    char *to = PyBytes_AS_STRING(numbers);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyArrayObject *array = (PyArrayObject *)PyTuple_GET_ITEM(arrays, i);
        const npy_intp length = run_length(array);
        copy_diagonal(array, length, to);
        to += length * PyArray_ITEMSIZE(array);
        copy_other_diagonal(array, length, to);
        to += length * PyArray_ITEMSIZE(array);
    }
    return numbers;
}
