/* SPDX-License-Identifier: Apache-2.0
 *
 * weights_type.c - Weights: checks the parameters of a layer and lets the core pack them.
 *
 * Owns: the packed parameters, and a reference to the key weights, which the core also reads unpacked. The other arrays
 * are read once and not kept.
 */
#include "weights_type.h"

#include <stddef.h>
#include <structmember.h>

#include "arrays.h"
#include "run.h"

/* The arguments of the constructor. References are borrowed. */
typedef struct {
    Py_ssize_t H, Hkv, D, Dv;
    mha_dtype dtype;
    PyArray_Descr *descr; /* owned */
    weight_arrays q_weight, k_weight, v_weight, out_weight;
    PyArrayObject *in_bias, *bias_k, *bias_v, *out_bias; /* NULL: none */
    bool is_attention_bf16;
} weights_arguments;

/* A parameter, and the shape that it has to have. -1: any length. */
typedef struct {
    PyArrayObject *array; /* NULL: none */
    const char *name;
    int ndim;
    npy_intp shape[3];
} parameter;

static int check_counts(const weights_arguments *given)
{
    if (given->H < 1 || given->Hkv < 1 || given->D < 1 || given->Dv < 1) {
        PyErr_Format(PyExc_ValueError,
                     "num_heads, num_kv_heads, head_dim and v_head_dim must be greater than 0, "
                     "got %zd, %zd, %zd and %zd",
                     given->H, given->Hkv, given->D, given->Dv);
        return -1;
    }
    if (given->H % given->Hkv != 0) {
        PyErr_Format(PyExc_ValueError, "num_heads (%zd) must be divisible by num_kv_heads (%zd)", given->H,
                     given->Hkv);
        return -1;
    }
    /* Then the sum of the three widths below cannot overflow either. */
    if (given->H > NPY_MAX_INTP / 3 / given->D || given->H > NPY_MAX_INTP / 3 / given->Dv) {
        PyErr_SetString(PyExc_ValueError, "num_heads * head_dim is too large");
        return -1;
    }
    return 0;
}

static int check_shape(const parameter *expected)
{
    PyArrayObject *array = expected->array;
    const int ndim = expected->ndim;
    if (array == NULL)
        return 0;
    npy_intp shape[3];
    for (int i = 0; i < ndim; i++) /* a length that may be any is the array's */
        shape[i] = expected->shape[i] == -1 && PyArray_NDIM(array) == ndim ? PyArray_DIM(array, i) : expected->shape[i];
    return array_has_shape(array, ndim, shape) ? 0 : raise_wrong_shape(array, expected->name, ndim, shape);
}

static int collect_attention(weights_arguments *given, PyObject *object)
{
    if (object == Py_None) {
        given->is_attention_bf16 = given->dtype == MHA_BFLOAT16;
        return 0;
    }
    given->is_attention_bf16 = is_text(object, "bfloat16");
    if (given->dtype != MHA_FLOAT64 && (given->is_attention_bf16 || is_text(object, "float32")))
        return 0;
    PyErr_SetString(PyExc_TypeError, "attention must be None, 'bfloat16' or 'float32', and None with float64");
    return -1;
}

static npy_intp length(PyArrayObject *array, int axis)
{
    return PyArray_DIM(array, axis);
}

static int check_shapes(const weights_arguments *given)
{
    const npy_intp q = given->H * given->D, k = given->Hkv * given->D, v = given->Hkv * given->Dv;
    const parameter expected[] = {
        {given->q_weight.numbers, "q_proj_weight", 2, {q, -1}},
        {given->k_weight.numbers, "k_proj_weight", 2, {k, -1}},
        {given->v_weight.numbers, "v_proj_weight", 2, {v, -1}},
        {given->in_bias, "in_proj_bias", 1, {q + k + v}},
        {given->bias_k, "bias_k", 3, {1, 1, k}},
        {given->bias_v, "bias_v", 3, {1, 1, v}},
        {given->out_weight.numbers, "out_proj_weight", 2, {-1, given->H * given->Dv}},
        {given->out_bias, "out_proj_bias", 1, {-1}},
    };
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        if (check_shape(&expected[i]) < 0)
            return -1;
    PyArrayObject *out_weight = given->out_weight.numbers;
    if (given->out_bias != NULL && length(given->out_bias, 0) != length(out_weight, 0)) {
        PyErr_Format(PyExc_ValueError, "out_proj_bias has %zd elements for the %zd rows of out_proj_weight",
                     length(given->out_bias, 0), length(out_weight, 0));
        return -1;
    }
    if ((given->bias_k == NULL) != (given->bias_v == NULL)) {
        PyErr_SetString(PyExc_AssertionError, given->bias_k == NULL ? "bias_v is set but bias_k is None"
                                                                    : "bias_k is set but bias_v is None");
        return -1;
    }
    return 0;
}

/* Takes the arrays from the objects that the constructor was called with, which are in the order of its docstring. */
static int collect(weights_arguments *given, PyObject *const *objects)
{
    struct {
        const char *name;
        weight_arrays *weight;
        PyArrayObject **optional;
    } const places[] = {
        {"q_proj_weight", &given->q_weight, NULL},     {"k_proj_weight", &given->k_weight, NULL},
        {"v_proj_weight", &given->v_weight, NULL},     {"in_proj_bias", NULL, &given->in_bias},
        {"bias_k", NULL, &given->bias_k},              {"bias_v", NULL, &given->bias_v},
        {"out_proj_weight", &given->out_weight, NULL}, {"out_proj_bias", NULL, &given->out_bias},
    };
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        const char *name = places[i].name;
        int result = 0;
        if (places[i].weight != NULL)
            result = weight_from_object(objects[i], name, given->dtype, places[i].weight);
        else if (objects[i] != Py_None)
            result = parameter_from_object(objects[i], name, given->dtype, places[i].optional);
        if (result < 0)
            return -1;
    }
    return 0;
}

static Py_ssize_t count_bytes(const weights_arguments *given)
{
    const weight_arrays *const weights[] = {&given->q_weight, &given->k_weight, &given->v_weight, &given->out_weight};
    PyArrayObject *const others[] = {given->in_bias, given->bias_k, given->bias_v, given->out_bias};
    Py_ssize_t bytes = 0;
    for (size_t i = 0; i < 4; i++)
        bytes += weight_nbytes(weights[i]) + (others[i] == NULL ? 0 : PyArray_NBYTES(others[i]));
    return bytes;
}

/* The arrays are read without the GIL. The key weights are read as long as `packed` lives. */
static PyObject *pin_parameters(const weights_arguments *given)
{
    PyArrayObject *const arrays[] = {given->q_weight.numbers, given->q_weight.scale, given->k_weight.numbers,
                                     given->k_weight.scale,   given->v_weight.numbers, given->v_weight.scale,
                                     given->out_weight.numbers, given->out_weight.scale, given->in_bias, given->bias_k,
                                     given->bias_v, given->out_bias};
    return pin_memory(arrays, sizeof arrays / sizeof *arrays);
}

static const char *numbers(PyArrayObject *array)
{
    return array == NULL ? NULL : PyArray_BYTES(array);
}

static mha_status pack(weights_object *self, const weights_arguments *given)
{
    const mha_widths *widths = &self->widths;
    const size_t item = mha_size_of(self->dtype);
    const char *in_bias = numbers(given->in_bias);
    const size_t k_offset = widths->H * widths->D * item, v_offset = k_offset + widths->Hkv * widths->D * item;
    const mha_parameters parameters = {
        .q_weight = weight_of(&given->q_weight),
        .k_weight = weight_of(&given->k_weight),
        .v_weight = weight_of(&given->v_weight),
        .q_bias = in_bias,
        .k_bias = in_bias == NULL ? NULL : in_bias + k_offset,
        .v_bias = in_bias == NULL ? NULL : in_bias + v_offset,
        .bias_k = numbers(given->bias_k),
        .bias_v = numbers(given->bias_v),
        .out_weight = weight_of(&given->out_weight),
        .out_bias = numbers(given->out_bias),
        .is_attention_bf16 = given->is_attention_bf16,
    };
    const size_t numbers_of_weights = widths->H * widths->D * widths->E +
                                      widths->Hkv * (widths->D * widths->Ek + widths->Dv * widths->Ev) +
                                      widths->Eo * widths->H * widths->Dv;
    PyThreadState *const thread = numbers_of_weights > PACK_WITHOUT_GIL ? PyEval_SaveThread() : NULL;
    const mha_status status = mha_layer_create(widths, self->dtype, &parameters, &self->packed);
    if (thread != NULL)
        PyEval_RestoreThread(thread);
    return status;
}

static PyObject *weights_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    weights_arguments given = {.in_bias = NULL};
    PyObject *objects[8], *attention = Py_None;
    weights_object *self = NULL;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) != 0) {
        PyErr_SetString(PyExc_TypeError, "Weights() takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "nnnnO&OOOOOOOO|O:Weights", &given.H, &given.Hkv, &given.D, &given.Dv,
                          PyArray_DescrConverter, &given.descr, &objects[0], &objects[1], &objects[2], &objects[3],
                          &objects[4], &objects[5], &objects[6], &objects[7], &attention) ||
        dtype_of_descr(given.descr, &given.dtype) < 0 || collect_attention(&given, attention) < 0 ||
        check_counts(&given) < 0 || collect(&given, objects) < 0 || check_shapes(&given) < 0)
        goto done;

    self = (weights_object *)type->tp_alloc(type, 0);
    if (self == NULL)
        goto done;
    self->dtype = given.dtype;
    self->descr = (PyArray_Descr *)Py_NewRef((PyObject *)given.descr);
    self->has_bias_kv = given.bias_k != NULL;
    self->nbytes = count_bytes(&given);
    self->widths = (mha_widths){
        .H = (size_t)given.H,
        .Hkv = (size_t)given.Hkv,
        .D = (size_t)given.D,
        .Dv = (size_t)given.Dv,
        .E = (size_t)length(given.q_weight.numbers, 1),
        .Ek = (size_t)length(given.k_weight.numbers, 1),
        .Ev = (size_t)length(given.v_weight.numbers, 1),
        .Eo = (size_t)length(given.out_weight.numbers, 0),
    };
    if (given.k_weight.scale == NULL)
        self->k_weight = Py_NewRef((PyObject *)given.k_weight.numbers);
    self->pins = pin_parameters(&given);
    if (self->pins == NULL || raise_status(pack(self, &given)) < 0)
        Py_CLEAR(self);
done:
    Py_XDECREF((PyObject *)given.descr);
    return (PyObject *)self;
}

static void weights_dealloc(PyObject *object)
{
    weights_object *self = (weights_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    mha_layer_destroy(self->packed);
    Py_XDECREF((PyObject *)self->descr);
    Py_XDECREF(self->k_weight);
    Py_XDECREF(self->pins);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyMemberDef weights_members[] = {
    {"nbytes", T_PYSSIZET, offsetof(weights_object, nbytes), READONLY,
     "Bytes of the parameters that this was made from; packed, they take about as many again."},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(weights_doc,
             "Weights(num_heads, num_kv_heads, head_dim, v_head_dim, dtype, q_proj_weight, k_proj_weight,\n"
             "        v_proj_weight, in_proj_bias, bias_k, bias_v, out_proj_weight, out_proj_bias,\n"
             "        attention=None, /)\n"
             "--\n\n"
             "One immutable set of parameters, packed for the kernels of this CPU.\n\n"
             "All arrays are C-contiguous, aligned, in native byte order and of this dtype: float32,\n"
             "float64, bfloat16 or float16. A weight may also be a tuple, except with float64: an\n"
             "int8 array, and a float32 array of the scales of its rows; or an array, and what its\n"
             "products read, 'bfloat16' or 'float32'. An array alone is multiplied in its dtype, float16\n"
             "as float32. Biases and bias_k / bias_v are None where the layer has none; in_proj_bias holds\n"
             "the biases of q, k and v, stacked. attention is what attention's own products read, of\n"
             "queries and keys, and of exponentials and values: 'bfloat16', 'float32', or None, as for an\n"
             "array alone. Anything else raises TypeError or ValueError.");

static PyType_Slot weights_slots[] = {
    {Py_tp_doc, (void *)weights_doc},
    {Py_tp_new, weights_new},
    {Py_tp_dealloc, weights_dealloc},
    {Py_tp_members, weights_members},
    {0, NULL},
};

PyType_Spec weights_type_spec = {
    .name = "mha_c._core.Weights",
    .basicsize = (int)sizeof(weights_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = weights_slots,
};
