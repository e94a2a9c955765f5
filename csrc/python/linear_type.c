/* SPDX-License-Identifier: Apache-2.0
 *
 * linear_type.c - Linear, which lets the core pack a linear map; linear() and activate(), which use the core by parts.
 *
 * Owns: the packed parameters. The arrays that they are made from are read once and not kept.
 */
#include "linear_type.h"

#include <stddef.h>
#include <structmember.h>

#include "arguments.h"
#include "arrays.h"
#include "run.h"

static mha_status pack(linear_object *self, const mha_weight *weight, const void *bias)
{
    const size_t features = (size_t)self->features, depth = (size_t)self->depth;
    PyThreadState *const thread = features * depth > PACK_WITHOUT_GIL ? PyEval_SaveThread() : NULL;
    const mha_status status = mha_linear_create(self->dtype, features, depth, weight, bias, &self->packed);
    if (thread != NULL)
        PyEval_RestoreThread(thread);
    return status;
}

static int check_linear(PyArrayObject *weight, PyArrayObject *bias)
{
    if (PyArray_NDIM(weight) != 2 || (bias != NULL && PyArray_NDIM(bias) != 1)) {
        PyErr_SetString(PyExc_TypeError, "weight must be a matrix and bias a vector or None");
        return -1;
    }
    if (bias != NULL && PyArray_DIM(bias, 0) != PyArray_DIM(weight, 0)) {
        PyErr_Format(PyExc_ValueError, "bias has %zd elements for the %zd rows of weight", PyArray_DIM(bias, 0),
                     PyArray_DIM(weight, 0));
        return -1;
    }
    return 0;
}

static PyObject *linear_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *weight_object, *bias_object;
    PyArray_Descr *descr = NULL;
    mha_dtype dtype;
    weight_arrays weight;
    PyArrayObject *bias = NULL;
    linear_object *self = NULL;
    PyObject *pins = NULL;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) != 0) {
        PyErr_SetString(PyExc_TypeError, "Linear() takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "O&OO:Linear", PyArray_DescrConverter, &descr, &weight_object, &bias_object) ||
        dtype_of_descr(descr, &dtype) < 0 || weight_from_object(weight_object, "weight", dtype, &weight) < 0 ||
        (bias_object != Py_None && parameter_from_object(bias_object, "bias", dtype, &bias) < 0) ||
        check_linear(weight.numbers, bias) < 0)
        goto done;

    self = (linear_object *)type->tp_alloc(type, 0);
    PyArrayObject *const arrays[] = {weight.numbers, weight.scale, bias};
    pins = pin_memory(arrays, 3);
    if (self == NULL || pins == NULL) {
        Py_CLEAR(self);
        goto done;
    }
    self->dtype = dtype;
    self->features = PyArray_DIM(weight.numbers, 0);
    self->depth = PyArray_DIM(weight.numbers, 1);
    self->nbytes = weight_nbytes(&weight) + (bias == NULL ? 0 : PyArray_NBYTES(bias));
    const mha_weight given = weight_of(&weight);
    if (raise_status(pack(self, &given, bias == NULL ? NULL : PyArray_DATA(bias))) < 0)
        Py_CLEAR(self);
done:
    Py_XDECREF((PyObject *)descr);
    Py_XDECREF(pins);
    return (PyObject *)self;
}

static void linear_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    mha_linear_destroy(((linear_object *)object)->packed);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyMemberDef linear_members[] = {
    {"nbytes", T_PYSSIZET, offsetof(linear_object, nbytes), READONLY,
     "Bytes of the parameters that this was made from; packed, they take about as many again."},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(linear_doc, "Linear(dtype, weight, bias, /)\n--\n\n"
                         "One immutable linear map, packed for the kernels of this CPU.\n\n"
                         "weight is (features, depth), and bias (features,) or None: C-contiguous, aligned, in native\n"
                         "byte order and of this dtype: float32, float64, bfloat16 or float16. weight may\n"
                         "also be a tuple, as a weight of Weights. Anything else raises TypeError or ValueError.");

static PyType_Slot linear_slots[] = {
    {Py_tp_doc, (void *)linear_doc},
    {Py_tp_new, linear_new},
    {Py_tp_dealloc, linear_dealloc},
    {Py_tp_members, linear_members},
    {0, NULL},
};

PyType_Spec linear_type_spec = {
    .name = "mha_c._core.Linear",
    .basicsize = (int)sizeof(linear_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = linear_slots,
};

/* ---- The calls ---- */

/* A C-contiguous array that an object stands for: a new reference. */
static PyArrayObject *contiguous(const module_state *state, PyObject *object)
{
    PyArrayObject *array = array_from_object(state, object, "input");
    if (array != NULL && !PyArray_ISCARRAY_RO(array))
        Py_SETREF(array, (PyArrayObject *)PyArray_NewCopy(array, NPY_CORDER));
    return array;
}

/* A new array like `input`, with another length of the last axis. */
static PyArrayObject *with_last_axis(PyArrayObject *input, npy_intp length, mha_dtype dtype)
{
    npy_intp shape[NPY_MAXDIMS];
    const int ndim = PyArray_NDIM(input);
    for (int axis = 0; axis < ndim; axis++)
        shape[axis] = axis == ndim - 1 ? length : PyArray_DIM(input, axis);
    return new_array(ndim, shape, dtype);
}

static int check_linear_input(const linear_object *weights, PyArrayObject *input)
{
    const int ndim = PyArray_NDIM(input);
    if (ndim == 0) {
        PyErr_SetString(PyExc_RuntimeError, "both arguments to linear need to be at least 1D, but they are 0D and 2D");
        return -1;
    }
    const npy_intp last = PyArray_DIM(input, ndim - 1);
    if (last != weights->depth) {
        PyErr_Format(PyExc_RuntimeError, "mat1 and mat2 shapes cannot be multiplied (%zdx%zd and %zdx%zd)",
                     PyArray_MultiplyList(PyArray_DIMS(input), ndim - 1), last, weights->depth, weights->features);
        return -1;
    }
    if (!array_has_dtype(input, weights->dtype)) {
        PyErr_Format(PyExc_RuntimeError, "mat1 and mat2 must have the same dtype, but got %s and %s",
                     torch_type_name(input), torch_dtype_name(weights->dtype));
        return -1;
    }
    return 0;
}

static size_t count_rows(PyArrayObject *input)
{
    return (size_t)PyArray_MultiplyList(PyArray_DIMS(input), PyArray_NDIM(input) - 1);
}

static mha_status start_linear(const void *call)
{
    return mha_apply_linear(call);
}

PyObject *linear(PyObject *module, PyObject *const *objects, Py_ssize_t count)
{
    module_state *state = PyModule_GetState(module);
    PyArrayObject *input = NULL, *x = NULL, *output = NULL;
    PyObject *result = NULL;
    if (count != 2 || !Py_IS_TYPE(objects[0], state->linear_type)) {
        PyErr_SetString(PyExc_TypeError, "linear takes a Linear and an input");
        return NULL;
    }
    const linear_object *weights = (const linear_object *)objects[0];
    input = contiguous(state, objects[1]);
    if (input == NULL || check_linear_input(weights, input) < 0) {
        mark_refused();
        goto done;
    }
    x = as_computed(input);
    output = x == NULL ? NULL : with_last_axis(input, weights->features, weights->dtype);
    if (output == NULL)
        goto done;
    mha_linear_call call = {.linear = weights->packed, .rows = count_rows(input), .x = PyArray_DATA(x),
                            .y = PyArray_DATA(output)};
    PyArrayObject *const arrays[] = {x, output};
    if (run_core(state, mha_linear_operations(&call), &call.threads, &call.stop, arrays, 2, start_linear, &call) == 0)
        result = as_stored(output, PyArray_DESCR(input), NULL);
done:
    Py_XDECREF(input);
    Py_XDECREF(x);
    Py_XDECREF(output);
    return result;
}

int collect_activation(PyObject *object, mha_activation *activation)
{
    static const struct {
        const char *name;
        mha_activation activation;
    } known[] = {{"relu", MHA_RELU}, {"gelu", MHA_GELU}, {"gelu_tanh", MHA_GELU_TANH}, {"silu", MHA_SILU},
                 {"quick_gelu", MHA_QUICK_GELU}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (is_text(object, known[i].name)) {
            *activation = known[i].activation;
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "activation must be 'relu', 'gelu', 'gelu_tanh', 'silu' or 'quick_gelu', not %R",
                 object);
    return -1;
}

static mha_status start_activation(const void *call)
{
    return mha_apply_activation(call);
}

static int check_activated(PyArrayObject *input, bool is_gated, mha_dtype *dtype)
{
    const int ndim = PyArray_NDIM(input);
    if (!find_dtype(input, dtype)) {
        PyErr_Format(PyExc_TypeError, "input must be of float32, float64, bfloat16 or float16, but is of %s",
                     torch_type_name(input));
        return -1;
    }
    if (ndim == 0 || (is_gated && PyArray_DIM(input, ndim - 1) % 2 != 0)) {
        PyErr_SetString(PyExc_ValueError, "input must have a last axis, of an even length if it is gated");
        return -1;
    }
    return 0;
}

PyObject *activate(PyObject *module, PyObject *const *objects, Py_ssize_t count)
{
    module_state *state = PyModule_GetState(module);
    PyArrayObject *input = NULL, *x = NULL, *output = NULL;
    PyObject *result = NULL;
    mha_dtype dtype = MHA_FLOAT32;
    mha_activation_call call = {.rows = 0};
    if (count != 3) {
        PyErr_Format(PyExc_TypeError, "activate expected 3 arguments, got %zd", count);
        return NULL;
    }
    if (collect_activation(objects[1], &call.activation) < 0 ||
        collect_flag(objects[2], "is_gated", &call.is_gated) < 0)
        return NULL;
    input = contiguous(state, objects[0]);
    if (input == NULL || check_activated(input, call.is_gated, &dtype) < 0) {
        mark_refused();
        goto done;
    }
    const npy_intp length = PyArray_DIM(input, PyArray_NDIM(input) - 1) / (call.is_gated ? 2 : 1);
    x = as_computed(input);
    output = x == NULL ? NULL : with_last_axis(input, length, dtype);
    if (output == NULL)
        goto done;
    call.dtype = mha_computed_in(dtype);
    call.rows = count_rows(input);
    call.width = (size_t)length;
    call.x = PyArray_DATA(x);
    call.y = PyArray_DATA(output);
    PyArrayObject *const arrays[] = {x, output};
    if (run_core(state, mha_activation_operations(&call), &call.threads, &call.stop, arrays, 2, start_activation,
                 &call) == 0)
        result = as_stored(output, PyArray_DESCR(input), NULL);
done:
    Py_XDECREF(input);
    Py_XDECREF(x);
    Py_XDECREF(output);
    return result;
}
