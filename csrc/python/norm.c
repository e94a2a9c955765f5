/* SPDX-License-Identifier: Apache-2.0
 *
 * norm.c - torch.nn.functional.layer_norm and rms_norm: their arguments, torch's checks in torch's order and words, and
 * the call of the core. An array that the core cannot read is copied.
 *
 * Owns: every reference that a call needs, in one struct, which one function releases. Functions that return an int
 * return 0, or -1 with an exception.
 */
#include "norm.h"

#include <float.h>

#include "../norm.h"
#include "arrays.h"
#include "run.h"

enum {
#define NUMBER(number, name) ARGUMENT_##number,
    NORM_ARGUMENTS(NUMBER)
#undef NUMBER
    ARGUMENT_COUNT
};

typedef struct {
    PyArrayObject *input, *weight, *bias; /* weight and bias NULL: none */
    PyArrayObject *given;                 /* input, before its halves were widened */
    PyArrayObject *output;
    int ndim; /* the axes that are normalized: the last ones of the input */
    npy_intp normalized_shape[NPY_MAXDIMS];

    bool has_eps;

    size_t length[NPY_MAXDIMS]; /* what `call` points to */
    ptrdiff_t distance[NPY_MAXDIMS];
    mha_norm_call call;
} norm_arguments;

/* ---- Arguments ---- */

static const char *function_name(const norm_arguments *arguments)
{
    return arguments->call.norm.is_rms ? "rms_norm" : "layer_norm";
}

static int raise_shape_type(const norm_arguments *arguments, PyObject *object)
{
    PyErr_Format(PyExc_TypeError, "%s(): argument 'normalized_shape' (position 2) must be tuple of ints, not %s",
                 function_name(arguments), Py_TYPE(object)->tp_name);
    return -1;
}

/* Any object with __index__ is an int, except that torch takes no bool for one. */
static int collect_size(const norm_arguments *arguments, PyObject *object, Py_ssize_t i, npy_intp *size)
{
    if (!PyIndex_Check(object) || PyBool_Check(object)) {
        PyErr_Format(PyExc_TypeError,
                     "%s(): argument 'normalized_shape' (position 2) must be tuple of ints, but found element of type "
                     "%s at pos %zd",
                     function_name(arguments), Py_TYPE(object)->tp_name, i);
        return -1;
    }
    *size = PyNumber_AsSsize_t(object, PyExc_OverflowError);
    return PyErr_Occurred() ? -1 : 0;
}

static int collect_shape(PyObject *object, norm_arguments *arguments)
{
    if (!PyTuple_Check(object) && !PyList_Check(object))
        return raise_shape_type(arguments, object);
    PyObject *shape = PySequence_Tuple(object); /* a list may change meanwhile */
    if (shape == NULL)
        return -1;
    const Py_ssize_t ndim = PyTuple_GET_SIZE(shape);
    int result = 0;
    if (ndim > NPY_MAXDIMS) {
        PyErr_Format(PyExc_ValueError, "normalized_shape has %zd axes, and an array at most %d", ndim, NPY_MAXDIMS);
        result = -1;
    }
    for (Py_ssize_t i = 0; result == 0 && i < ndim; i++)
        result = collect_size(arguments, PyTuple_GET_ITEM(shape, i), i, &arguments->normalized_shape[i]);
    arguments->ndim = (int)ndim;
    Py_DECREF(shape);
    return result;
}

/* None is the machine's epsilon, and rms_norm alone has that default. */
static int collect_eps(PyObject *object, norm_arguments *arguments)
{
    arguments->has_eps = object != Py_None || !arguments->call.norm.is_rms;
    if (!arguments->has_eps)
        return 0;
    arguments->call.norm.eps = PyFloat_AsDouble(object);
    if (!PyErr_Occurred())
        return 0;
    if (PyErr_ExceptionMatches(PyExc_TypeError))
        PyErr_Format(PyExc_TypeError, "%s(): argument 'eps' (position %d) must be float, not %s",
                     function_name(arguments), arguments->call.norm.is_rms ? 4 : 5, Py_TYPE(object)->tp_name);
    return -1;
}

/* Whether the numbers of the last axes are adjacent and aligned. Also true of arrays without numbers. */
static bool has_adjacent_axes(PyArrayObject *array, int axes)
{
    npy_intp distance = PyArray_ITEMSIZE(array);
    const int ndim = PyArray_NDIM(array);
    if (PyArray_SIZE(array) == 0)
        return true;
    for (int axis = ndim - 1; axis >= 0 && axis >= ndim - axes; axis--) {
        if (PyArray_DIM(array, axis) != 1 && PyArray_STRIDE(array, axis) != distance)
            return false;
        distance *= PyArray_DIM(array, axis);
    }
    return PyArray_ISALIGNED(array);
}

static int make_readable(norm_arguments *arguments)
{
    PyArrayObject **const arrays[] = {&arguments->input, &arguments->weight, &arguments->bias};
    size_t i = 0;
    while (i < sizeof arrays / sizeof *arrays) {
        if (*arrays[i] == NULL || has_adjacent_axes(*arrays[i], arguments->ndim)) {
            i++;
            continue;
        }
        PyArrayObject *copy = (PyArrayObject *)PyArray_NewCopy(*arrays[i], NPY_CORDER);
        if (copy == NULL)
            return -1;
        Py_SETREF(*arrays[i], copy);
        i = 0; /* meanwhile, other threads may have changed an array that needed no copy before */
    }
    return 0;
}

/* Collecting runs Python code. None runs between the end of this function and the start of the core. */
static int collect(const module_state *state, PyObject *const *objects, norm_arguments *arguments)
{
    const int is_rms = PyObject_IsTrue(objects[ARGUMENT_IS_RMS]);
    arguments->call.norm.is_rms = is_rms > 0;
    if (is_rms < 0 || collect_shape(objects[ARGUMENT_NORMALIZED_SHAPE], arguments) < 0 ||
        collect_eps(objects[ARGUMENT_EPS], arguments) < 0 ||
        collect_array(state, objects[ARGUMENT_INPUT], "input", &arguments->input) < 0 ||
        collect_optional(state, objects[ARGUMENT_WEIGHT], "weight", &arguments->weight) < 0 ||
        collect_optional(state, objects[ARGUMENT_BIAS], "bias", &arguments->bias) < 0)
        return -1;
    return make_readable(arguments);
}

/* ---- torch's checks ---- */

static int raise_parameter_shape(const norm_arguments *arguments, PyArrayObject *parameter, const char *name)
{
    PyObject *shape = shape_as_list(PyArray_NDIM(parameter), PyArray_DIMS(parameter));
    PyObject *expected = shape_as_list(arguments->ndim, arguments->normalized_shape);
    if (shape != NULL && expected != NULL)
        PyErr_Format(PyExc_RuntimeError,
                     "Expected %s to be of same shape as normalized_shape, but got %s of shape %R and normalized_shape "
                     "= %R",
                     name, name, shape, expected);
    Py_XDECREF(shape);
    Py_XDECREF(expected);
    return -1;
}

static int raise_input_shape(const norm_arguments *arguments)
{
    PyObject *expected = shape_as_list(arguments->ndim, arguments->normalized_shape);
    PyObject *shape = shape_as_list(PyArray_NDIM(arguments->input), PyArray_DIMS(arguments->input));
    PyObject *text = expected == NULL ? NULL : PyObject_Str(expected);
    PyObject *sizes = text == NULL ? NULL : PyUnicode_Substring(text, 1, PY_SSIZE_T_MAX);
    if (shape != NULL && sizes != NULL)
        PyErr_Format(PyExc_RuntimeError,
                     "Given normalized_shape=%U, expected input with shape [*%s%U, but got input of size%R", text,
                     arguments->call.norm.is_rms ? "" : ", ", sizes, shape); /* commas and blanks are torch's */
    Py_XDECREF(expected);
    Py_XDECREF(shape);
    Py_XDECREF(text);
    Py_XDECREF(sizes);
    return -1;
}

static int check_shapes(const norm_arguments *arguments)
{
    PyArrayObject *input = arguments->input, *weight = arguments->weight, *bias = arguments->bias;
    const int ndim = arguments->ndim, lead = PyArray_NDIM(input) - ndim;
    const npy_intp *shape = arguments->normalized_shape;
    if (ndim == 0) {
        PyErr_SetString(PyExc_RuntimeError,
                        "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one "
                        "element, but got normalized_shape = []");
        return -1;
    }
    if (weight != NULL && !array_has_shape(weight, ndim, shape))
        return raise_parameter_shape(arguments, weight, "weight");
    if (bias != NULL && !array_has_shape(bias, ndim, shape))
        return raise_parameter_shape(arguments, bias, "bias");
    if (lead < 0 && arguments->call.norm.is_rms) {
        PyErr_Format(PyExc_ValueError, "Input tensor must have at least %d dimensions, but got %d", ndim,
                     PyArray_NDIM(input));
        return -1;
    }
    if (lead < 0 || !PyArray_CompareLists(PyArray_DIMS(input) + lead, shape, ndim))
        return raise_input_shape(arguments);
    return 0;
}

static bool have_one_dtype(PyArrayObject *a, PyArrayObject *b)
{
    return PyArray_EquivTypes(PyArray_DESCR(a), PyArray_DESCR(b));
}

static bool is_float32(PyArrayObject *array)
{
    return array == NULL || array_has_dtype(array, MHA_FLOAT32);
}

/* torch computes rms_norm with a weight of another dtype. It is refused here as layer_norm refuses it: halves alone are
 * normalized with parameters of float32. */
static int check_dtypes(const norm_arguments *arguments)
{
    PyArrayObject *input = arguments->input, *weight = arguments->weight, *bias = arguments->bias;
    PyArrayObject *parameter = weight != NULL ? weight : bias;
    mha_dtype dtype = MHA_FLOAT32;
    const bool is_known = find_dtype(input, &dtype);
    if (mha_is_half(dtype) && is_float32(weight) && is_float32(bias))
        return 0;
    if (parameter != NULL && !have_one_dtype(input, parameter)) {
        PyErr_SetString(PyExc_RuntimeError,
                        is_float32(weight) && is_float32(bias)
                            ? "mixed dtype (CPU): all inputs must share same datatype."
                            : "mixed dtype (CPU): expect parameter to have scalar type of Float");
        return -1;
    }
    if (!is_known) {
        PyErr_Format(PyExc_NotImplementedError, "\"%s\" not implemented for '%s'",
                     arguments->call.norm.is_rms ? "rms_norm" : "LayerNormKernelImpl", torch_type_name(input));
        return -1;
    }
    if (bias != NULL && !have_one_dtype(input, bias)) {
        PyErr_Format(PyExc_RuntimeError, "expected scalar type %s but found %s", torch_type_name(input),
                     torch_type_name(bias));
        return -1;
    }
    return 0;
}

/* ---- The call ---- */

static int prepare(norm_arguments *arguments)
{
    PyArrayObject **const inputs[] = {&arguments->input, &arguments->weight, &arguments->bias};
    mha_dtype dtype = MHA_FLOAT32;
    arguments->given = (PyArrayObject *)Py_NewRef((PyObject *)arguments->input);
    (void)find_dtype(arguments->given, &dtype); /* it is known, as the checks saw */
    if (mha_is_half(dtype) && take_computed(inputs, sizeof inputs / sizeof *inputs) < 0)
        return -1;
    PyArrayObject *input = arguments->input;
    mha_norm_call *call = &arguments->call;
    const int lead = PyArray_NDIM(input) - arguments->ndim;
    call->dtype = mha_computed_in(dtype);
    if (!arguments->has_eps)
        call->norm.eps = call->dtype == MHA_FLOAT64 ? DBL_EPSILON : FLT_EPSILON;
    call->axes = (size_t)lead;
    call->length = arguments->length;
    call->distance = arguments->distance;
    for (int axis = 0; axis < lead; axis++) {
        arguments->length[axis] = (size_t)PyArray_DIM(input, axis);
        arguments->distance[axis] = PyArray_STRIDE(input, axis);
    }
    call->width = (size_t)PyArray_MultiplyList(arguments->normalized_shape, arguments->ndim);
    call->x = PyArray_DATA(input);
    call->norm.weight = arguments->weight == NULL ? NULL : PyArray_DATA(arguments->weight);
    call->norm.bias = arguments->bias == NULL ? NULL : PyArray_DATA(arguments->bias);
    arguments->output = new_array(PyArray_NDIM(input), PyArray_DIMS(input), call->dtype);
    if (arguments->output == NULL)
        return -1;
    call->y = PyArray_DATA(arguments->output);
    return 0;
}

static mha_status start(const void *call)
{
    return mha_apply_norm(call);
}

static void release(norm_arguments *arguments)
{
    Py_XDECREF(arguments->input);
    Py_XDECREF(arguments->weight);
    Py_XDECREF(arguments->bias);
    Py_XDECREF(arguments->given);
    Py_XDECREF(arguments->output);
}

PyObject *normalize(PyObject *module, PyObject *const *objects, Py_ssize_t count)
{
    module_state *state = PyModule_GetState(module);
    norm_arguments arguments;
    mha_norm_call *call = &arguments.call;
    PyObject *result = NULL;
    arguments.input = arguments.weight = arguments.bias = arguments.given = arguments.output = NULL;
    /* the rest is filled where used */
    *call = (mha_norm_call){0};

    if (count != ARGUMENT_COUNT) {
        PyErr_Format(PyExc_TypeError, "normalize expected %d arguments, got %zd", (int)ARGUMENT_COUNT, count);
        goto done;
    }
    if (collect(state, objects, &arguments) < 0 || check_shapes(&arguments) < 0 || check_dtypes(&arguments) < 0) {
        mark_refused();
        goto done;
    }
    if (prepare(&arguments) < 0)
        goto done;
    PyArrayObject *const arrays[] = {arguments.input, arguments.weight, arguments.bias, arguments.output};
    if (run_core(state, mha_norm_operations(call), &call->threads, &call->stop, arrays,
                 sizeof arrays / sizeof *arrays, start, call) < 0)
        goto done;
    result = as_stored(arguments.output, PyArray_DESCR(arguments.given), NULL);
done:
    release(&arguments);
    return result;
}
