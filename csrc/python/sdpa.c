/* SPDX-License-Identifier: Apache-2.0
 *
 * sdpa.c - torch.nn.functional.scaled_dot_product_attention: its arguments, its checks in torch's order and words, and
 * the call of the core. Leading axes are broadcast by strides of 0. An array that the core cannot read is copied.
 *
 * Owns: every reference that a call needs, in one struct, which one function releases. Functions that return an int
 * return 0, or -1 with an exception.
 */
#include "sdpa.h"

#include <math.h>

#include "arrays.h"
#include "run.h"

enum {
#define NUMBER(number, name) ARGUMENT_##number,
    SDPA_ARGUMENTS(NUMBER)
#undef NUMBER
    ARGUMENT_COUNT
};

typedef struct {
    int ndim;
    npy_intp dims[NPY_MAXDIMS];
} shape;

typedef struct {
    PyArrayObject *query, *key, *value, *attn_mask; /* attn_mask NULL: none */
    PyArrayObject *out;                             /* borrowed from the caller's arguments; NULL: none */
    PyArrayObject *output;                          /* what the core writes; may be out itself */
    bool enable_gqa, has_scale;
    double dropout_p; /* as given */

    shape scores; /* leading axes of query and key together, then L, S */
    shape result; /* those of the value as well, then L, Ev */

    size_t length[NPY_MAXDIMS]; /* what `call` points to */
    ptrdiff_t query_axes[NPY_MAXDIMS], key_axes[NPY_MAXDIMS], value_axes[NPY_MAXDIMS], mask_axes[NPY_MAXDIMS],
        output_axes[NPY_MAXDIMS];
    mha_sdpa_call call;
} sdpa_arguments;

static npy_intp from_end(PyArrayObject *array, int axis)
{
    return PyArray_DIM(array, PyArray_NDIM(array) - axis);
}

/* ---- Arguments ---- */

static int raise_type(const char *name, const char *type, PyObject *object)
{
    PyErr_Format(PyExc_TypeError, "scaled_dot_product_attention(): argument '%s' must be %s, not %s", name, type,
                 Py_TYPE(object)->tp_name);
    return -1;
}

static int collect_bool(PyObject *object, const char *name, bool *flag)
{
    if (!PyBool_Check(object) && !PyArray_IsScalar(object, Bool))
        return raise_type(name, "bool", object);
    *flag = PyObject_IsTrue(object) == 1;
    return 0;
}

static int collect_double(PyObject *object, const char *name, double *number)
{
    *number = PyFloat_AsDouble(object);
    if (*number != -1 || !PyErr_Occurred())
        return 0;
    if (!PyErr_ExceptionMatches(PyExc_TypeError))
        return -1;
    PyErr_Clear();
    return raise_type(name, "float", object);
}

static bool has_our_dtype(PyArrayObject *array)
{
    mha_dtype dtype;
    return find_dtype(array, &dtype);
}

/* Whether the core can read the rows of an array in place. Also true of arrays that it does not read. */
static bool is_readable(PyArrayObject *array, bool ascends)
{
    const int ndim = PyArray_NDIM(array);
    const npy_intp *strides = PyArray_STRIDES(array);
    if (ndim < 2 || PyArray_SIZE(array) == 0 || !has_our_dtype(array))
        return true;
    return PyArray_ISALIGNED(array) && (from_end(array, 1) <= 1 || strides[ndim - 1] == PyArray_ITEMSIZE(array)) &&
           (!ascends || from_end(array, 2) <= 1 || strides[ndim - 2] >= 0);
}

static int make_readable(sdpa_arguments *arguments)
{
    PyArrayObject **const arrays[] = {&arguments->query, &arguments->key, &arguments->value};
    size_t i = 0;
    while (i < 3) {
        if (is_readable(*arrays[i], i == 0)) {
            i++;
            continue;
        }
        PyArrayObject *copy = (PyArrayObject *)PyArray_NewCopy(*arrays[i], NPY_CORDER);
        if (copy == NULL)
            return -1;
        Py_SETREF(*arrays[i], copy);
        /* no other code has a reference to the copy, but other threads may have changed an array that needed no copy
         * before */
        i = 0;
    }
    return 0;
}

/* Collecting runs Python code. None runs between the end of this function and the start of the core. */
static int collect(const module_state *state, PyObject *const *objects, sdpa_arguments *arguments)
{
    mha_sdpa_call *call = &arguments->call;
    PyObject *scale = objects[ARGUMENT_SCALE];
    arguments->has_scale = scale != Py_None;
    if (collect_double(objects[ARGUMENT_DROPOUT_P], "dropout_p", &arguments->dropout_p) < 0 ||
        collect_bool(objects[ARGUMENT_IS_CAUSAL], "is_causal", &call->is_causal) < 0 ||
        collect_bool(objects[ARGUMENT_ENABLE_GQA], "enable_gqa", &arguments->enable_gqa) < 0 ||
        (arguments->has_scale && collect_double(scale, "scale", &call->scale) < 0))
        return -1;
    call->dropout_seed = PyLong_AsUnsignedLongLong(objects[ARGUMENT_DROPOUT_SEED]);
    if (PyErr_Occurred())
        return -1;
    if (collect_array(state, objects[ARGUMENT_QUERY], "query", &arguments->query) < 0 ||
        collect_array(state, objects[ARGUMENT_KEY], "key", &arguments->key) < 0 ||
        collect_array(state, objects[ARGUMENT_VALUE], "value", &arguments->value) < 0 ||
        collect_mask(state, objects[ARGUMENT_ATTN_MASK], "attn_mask", &arguments->attn_mask) < 0 ||
        out_from_object(state, objects[ARGUMENT_OUT], &arguments->out) < 0)
        return -1;
    return make_readable(arguments);
}

/* ---- torch's checks ---- */

static int check_supported(const sdpa_arguments *arguments)
{
    PyArrayObject *query = arguments->query;
    if (has_our_dtype(query))
        return 0;
    if (array_is_floating(query) || PyArray_ISCOMPLEX(query))
        PyErr_Format(PyExc_NotImplementedError, "\"%s\" not implemented for '%s'",
                     PyArray_ISCOMPLEX(query) ? "softmax_lastdim_kernel_impl" : "scaled_dot_product_attention",
                     torch_type_name(query));
    else
        PyErr_Format(PyExc_RuntimeError, "expected m1 and m2 to have the same dtype, but got: float != %s",
                     cpp_type_name(query));
    return -1;
}

static int check_dtypes_and_ranks(const sdpa_arguments *arguments)
{
    PyArrayObject *query = arguments->query, *key = arguments->key, *value = arguments->value;
    PyArrayObject *mask = arguments->attn_mask;
    if (!PyArray_EquivTypes(PyArray_DESCR(query), PyArray_DESCR(key)) ||
        !PyArray_EquivTypes(PyArray_DESCR(query), PyArray_DESCR(value))) {
        PyErr_Format(PyExc_RuntimeError,
                     "Expected query, key, and value to have the same dtype, but got query.dtype: %s key.dtype: %s "
                     "and value.dtype: %s instead.",
                     cpp_type_name(query), cpp_type_name(key), cpp_type_name(value));
        return -1;
    }
    if (PyArray_NDIM(query) < 2 || PyArray_NDIM(key) < 2 || PyArray_NDIM(value) < 2) {
        PyErr_Format(PyExc_RuntimeError,
                     "Expected query, key, and value to all be  at least 2 dimensional, but got query.dim: %d "
                     "key.dim: %d and value.dim: %d instead.",
                     PyArray_NDIM(query), PyArray_NDIM(key), PyArray_NDIM(value));
        return -1;
    }
    if (mask != NULL && !PyArray_ISBOOL(mask) && !array_is_floating(mask)) {
        PyErr_Format(PyExc_RuntimeError,
                     "Expected attn_mask dtype to be bool or float or to match query dtype, but got attn_mask.dtype: "
                     "%s and  query.dtype: %s instead.",
                     cpp_type_name(mask), cpp_type_name(query));
        return -1;
    }
    return check_supported(arguments);
}

static int check_groups(const sdpa_arguments *arguments)
{
    PyArrayObject *const arrays[] = {arguments->query, arguments->key, arguments->value};
    if (!arguments->enable_gqa)
        return 0;
    for (size_t i = 0; i < 3; i++) {
        if (PyArray_NDIM(arrays[i]) < 3) {
            PyErr_SetString(PyExc_IndexError,
                            "Dimension out of range (expected to be in range of [-2, 1], but got -3)");
            return -1;
        }
        const npy_intp H = from_end(arrays[0], 3), heads = from_end(arrays[i], 3);
        if (heads != 0 && H % heads != 0) {
            PyErr_SetString(PyExc_RuntimeError, "Number of heads in key and value must divide the number of heads in ");
            return -1;
        }
    }
    return 0;
}

/* torch's fused kernel reads two axes of any mask. torch takes it for these inputs only. */
static int check_mask_rank(const sdpa_arguments *arguments)
{
    PyArrayObject *query = arguments->query, *key = arguments->key, *value = arguments->value;
    PyArrayObject *mask = arguments->attn_mask;
    if (mask == NULL || PyArray_NDIM(mask) >= 2 || PyArray_NDIM(query) != 4 || PyArray_NDIM(key) != 4 ||
        PyArray_NDIM(value) != 4 || arguments->dropout_p > 0 || PyArray_SIZE(query) == 0 || PyArray_SIZE(key) == 0 ||
        PyArray_SIZE(value) == 0)
        return 0;
    const int same = arguments->enable_gqa ? 1 : 2;
    if (!PyArray_CompareLists(PyArray_DIMS(query), PyArray_DIMS(key), same) ||
        !PyArray_CompareLists(PyArray_DIMS(query), PyArray_DIMS(value), same))
        return 0;
    PyErr_SetString(PyExc_IndexError, PyArray_NDIM(mask) == 0
                                          ? "Dimension specified as -2 but tensor has no dimensions"
                                          : "Dimension out of range (expected to be in range of [-1, 0], but got -2)");
    return -1;
}

/* ---- Shapes ---- */

/* a becomes the shape to which both are broadcast. */
static int broadcast(shape *a, const shape *b)
{
    const int ndim = a->ndim > b->ndim ? a->ndim : b->ndim;
    shape both = {.ndim = ndim};
    for (int i = ndim - 1; i >= 0; i--) {
        const int a_axis = i - ndim + a->ndim, b_axis = i - ndim + b->ndim;
        const npy_intp a_size = a_axis < 0 ? 1 : a->dims[a_axis], b_size = b_axis < 0 ? 1 : b->dims[b_axis];
        if (a_size != b_size && a_size != 1 && b_size != 1) {
            PyErr_Format(PyExc_RuntimeError,
                         "The size of tensor a (%zd) must match the size of tensor b (%zd) at non-singleton dimension "
                         "%d",
                         a_size, b_size, i);
            return -1;
        }
        both.dims[i] = a_size == 1 ? b_size : a_size;
    }
    *a = both;
    return 0;
}

static shape whole_shape(PyArrayObject *array)
{
    shape s = {.ndim = PyArray_NDIM(array)};
    for (int i = 0; i < s.ndim; i++)
        s.dims[i] = PyArray_DIM(array, i);
    return s;
}

/* All axes but the last two. Grouped heads of keys and values are repeated. */
static shape leading_shape(const sdpa_arguments *arguments, PyArrayObject *array)
{
    shape s = whole_shape(array);
    s.ndim -= 2;
    if (arguments->enable_gqa)
        s.dims[s.ndim - 1] = from_end(arguments->query, 3);
    return s;
}

static void append(shape *s, npy_intp rows, npy_intp columns)
{
    s->dims[s->ndim++] = rows;
    s->dims[s->ndim++] = columns;
}

/* What torch says if the rows of one matrix do not fit the columns of another. `lead` is the leading shape of both
 * after broadcasting. */
static int check_product(const shape *lead, npy_intp rows, npy_intp depth, npy_intp other_depth, npy_intp columns)
{
    if (depth == other_depth)
        return 0;
    if (lead->ndim == 0) {
        PyErr_Format(PyExc_RuntimeError, "mat1 and mat2 shapes cannot be multiplied (%zdx%zd and %zdx%zd)", rows, depth,
                     other_depth, columns);
        return -1;
    }
    const npy_intp batch = PyArray_MultiplyList(lead->dims, lead->ndim);
    PyErr_Format(PyExc_RuntimeError,
                 "Expected size for first two dimensions of batch2 tensor to be: [%zd, %zd] but got: [%zd, %zd].",
                 batch, depth, batch, other_depth);
    return -1;
}

static int check_mask_shape(const sdpa_arguments *arguments)
{
    if (arguments->attn_mask == NULL)
        return 0;
    const shape *scores = &arguments->scores, mask = whole_shape(arguments->attn_mask);
    shape both = *scores;
    if (broadcast(&both, &mask) < 0)
        return -1;
    if (both.ndim == scores->ndim && PyArray_CompareLists(both.dims, scores->dims, both.ndim))
        return 0;
    PyObject *scores_list = shape_as_list(scores->ndim, scores->dims);
    PyObject *both_list = shape_as_list(both.ndim, both.dims);
    if (scores_list != NULL && both_list != NULL)
        PyErr_Format(PyExc_RuntimeError, "output with shape %R doesn't match the broadcast shape %R", scores_list,
                     both_list);
    Py_XDECREF(scores_list);
    Py_XDECREF(both_list);
    return -1;
}

static int check_dropout(const sdpa_arguments *arguments)
{
    if (!(arguments->dropout_p > 1))
        return 0;
    char *text = PyOS_double_to_string(arguments->dropout_p, 'g', 6, 0, NULL); /* as C++ prints it */
    if (text == NULL)
        return -1;
    PyErr_Format(PyExc_RuntimeError, "dropout probability has to be between 0 and 1, but got %s", text);
    PyMem_Free(text);
    return -1;
}

static int find_shapes(sdpa_arguments *arguments)
{
    PyArrayObject *query = arguments->query, *key = arguments->key, *value = arguments->value;
    const npy_intp L = from_end(query, 2), S = from_end(key, 2), E = from_end(query, 1), Ev = from_end(value, 1);
    const shape of_key = leading_shape(arguments, key), of_value = leading_shape(arguments, value);
    shape *scores = &arguments->scores, *result = &arguments->result;
    *scores = leading_shape(arguments, query);
    if (broadcast(scores, &of_key) < 0 || check_product(scores, L, E, from_end(key, 1), S) < 0)
        return -1;
    *result = *scores;
    append(scores, L, S);
    if (check_mask_shape(arguments) < 0 || broadcast(result, &of_value) < 0 ||
        check_product(result, L, S, from_end(value, 2), Ev) < 0)
        return -1;
    append(result, L, Ev);
    return check_dropout(arguments);
}

/* ---- The call ---- */

/* The stride of an axis, counted from the last axis, which is 1. It is 0 if the array is broadcast along it. */
static ptrdiff_t stride_of(PyArrayObject *array, int axis)
{
    const int ndim = PyArray_NDIM(array);
    return axis > ndim || from_end(array, axis) == 1 ? 0 : PyArray_STRIDE(array, ndim - axis);
}

/* Lists the strides of the axes before the heads. */
static void list_strides(PyArrayObject *array, size_t axes, ptrdiff_t *strides)
{
    for (size_t i = 0; i < axes; i++)
        strides[i] = stride_of(array, 3 + (int)(axes - i));
}

/* There may be no grouped heads at all. Then there are no keys either. */
static bool has_heads(const sdpa_arguments *arguments, PyArrayObject *array)
{
    return !arguments->enable_gqa || from_end(array, 3) > 0;
}

static size_t count_heads(const sdpa_arguments *arguments, PyArrayObject *array)
{
    return PyArray_NDIM(array) < 3 || !has_heads(arguments, array) ? 1 : (size_t)from_end(array, 3);
}

static mha_heads describe_heads(const sdpa_arguments *arguments, PyArrayObject *array, ptrdiff_t *strides)
{
    list_strides(array, arguments->call.axes, strides);
    return (mha_heads){.rows = {.data = PyArray_DATA(array),
                                .type = arguments->call.dtype,
                                .head = stride_of(array, 3),
                                .row = stride_of(array, 2),
                                .element = (ptrdiff_t)mha_size_of(arguments->call.dtype)},
                       .heads = count_heads(arguments, array),
                       .axes = strides};
}

static void describe_mask(sdpa_arguments *arguments)
{
    mha_sdpa_call *call = &arguments->call;
    if (arguments->attn_mask == NULL)
        return;
    call->mask.kind = mask_kind(arguments->attn_mask);
    if (call->mask.kind == MHA_MASK_HIDE)
        call->mask.kind = MHA_MASK_SHOW; /* the opposite convention */
    PyArrayObject *mask = arguments->attn_mask;
    list_strides(mask, call->axes, arguments->mask_axes);
    call->mask_axes = arguments->mask_axes;
    call->mask.data = PyArray_DATA(mask);
    call->mask.stride_h = stride_of(mask, 3);
    call->mask.stride_l = stride_of(mask, 2);
    call->mask.stride_s = stride_of(mask, 1);
}

/* In out= itself, where the core can write it. */
static PyArrayObject *make_output(const sdpa_arguments *arguments)
{
    const shape *result = &arguments->result;
    PyArrayObject *out = arguments->out;
    PyArrayObject *const inputs[] = {arguments->query, arguments->key, arguments->value, arguments->attn_mask};
    if (out != NULL && check_out(out, arguments->call.dtype, result->ndim, result->dims) < 0)
        return NULL;
    if (out != NULL && PyArray_ISNOTSWAPPED(out) && is_readable(out, true) &&
        is_apart(out, inputs, sizeof inputs / sizeof *inputs))
        return (PyArrayObject *)Py_NewRef((PyObject *)out);
    return new_stored_array(result->ndim, result->dims, PyArray_TYPE(arguments->query));
}

static int prepare(sdpa_arguments *arguments)
{
    mha_sdpa_call *call = &arguments->call;
    const shape *result = &arguments->result;
    const int lead = result->ndim - 2;
    const size_t H = lead > 0 ? (size_t)result->dims[lead - 1] : 1;
    (void)find_dtype(arguments->query, &call->dtype); /* it is known, as the checks saw */
    call->axes = lead > 0 ? (size_t)lead - 1 : 0;
    call->length = arguments->length;
    for (size_t i = 0; i < call->axes; i++)
        arguments->length[i] = (size_t)result->dims[i];
    call->L = (size_t)from_end(arguments->query, 2);
    call->S = has_heads(arguments, arguments->key) && has_heads(arguments, arguments->value)
                  ? (size_t)from_end(arguments->key, 2)
                  : 0;
    call->D = (size_t)from_end(arguments->query, 1);
    call->Dv = (size_t)from_end(arguments->value, 1);
    if (!arguments->has_scale)
        call->scale = 1 / sqrt((double)call->D);
    call->dropout_p = arguments->dropout_p > 0 ? arguments->dropout_p : 0; /* negative numbers and NaN drop nothing */
    describe_mask(arguments);
    call->query = describe_heads(arguments, arguments->query, arguments->query_axes);
    call->query.heads = H; /* also if the query is broadcast */
    call->key = describe_heads(arguments, arguments->key, arguments->key_axes);
    call->value = describe_heads(arguments, arguments->value, arguments->value_axes);
    arguments->output = make_output(arguments);
    if (arguments->output == NULL)
        return -1;
    call->output = describe_heads(arguments, arguments->output, arguments->output_axes);
    return 0;
}

static mha_status start(const void *call)
{
    return mha_sdpa(call);
}

static void release(sdpa_arguments *arguments)
{
    Py_XDECREF(arguments->query);
    Py_XDECREF(arguments->key);
    Py_XDECREF(arguments->value);
    Py_XDECREF(arguments->attn_mask);
    Py_XDECREF(arguments->output);
}

PyObject *scaled_dot_product_attention(PyObject *module, PyObject *const *objects, Py_ssize_t count)
{
    module_state *state = PyModule_GetState(module);
    sdpa_arguments arguments = {0};
    mha_sdpa_call *call = &arguments.call;
    PyObject *result = NULL;

    if (count != ARGUMENT_COUNT) {
        PyErr_Format(PyExc_TypeError, "scaled_dot_product_attention expected %d arguments, got %zd",
                     (int)ARGUMENT_COUNT, count);
        goto done;
    }
    if (collect(state, objects, &arguments) < 0 || check_dtypes_and_ranks(&arguments) < 0 ||
        check_groups(&arguments) < 0 || check_mask_rank(&arguments) < 0 || find_shapes(&arguments) < 0) {
        mark_refused();
        goto done;
    }
    if (prepare(&arguments) < 0)
        goto done;
    PyArrayObject *const arrays[] = {arguments.query, arguments.key, arguments.value, arguments.attn_mask,
                                     arguments.output};
    if (run_core(state, mha_sdpa_operations(call), &call->threads, &call->stop, arrays,
                 sizeof arrays / sizeof *arrays, start, call) < 0)
        goto done;
    result = handed_back(arguments.output, arguments.out);
done:
    release(&arguments);
    return result;
}
