/* SPDX-License-Identifier: Apache-2.0
 *
 * torch_checks.c - the checks of torch.nn.MultiheadAttention.forward, in torch's order, with its exceptions and its
 * words. Shapes are printed as tuples. Where a layer has widths that torch's cannot have (head_dim, num_kv_heads and
 * others), a message names the width that torch would have computed from embed_dim.
 *
 * Every check returns 0, or -1 with an exception.
 */
#include "torch_checks.h"

#include <math.h>

#include "arrays.h"

enum { LENGTH, BATCH, FEATURES }; /* of the shapes in call_arguments */

/* The product of two sizes. If it overflows, the largest size, which no array has. */
static npy_intp product(npy_intp a, npy_intp b)
{
    npy_intp result;
    return __builtin_mul_overflow(a, b, &result) ? NPY_MAX_INTP : result;
}

/* Raises an exception. `format` has two %R, for the two shapes in this order. */
static int raise_shapes(PyObject *exception, const char *format, int a_ndim, const npy_intp *a, int b_ndim,
                        const npy_intp *b)
{
    PyObject *a_tuple = PyArray_IntTupleFromIntp(a_ndim, a);
    PyObject *b_tuple = PyArray_IntTupleFromIntp(b_ndim, b);
    if (a_tuple != NULL && b_tuple != NULL)
        PyErr_Format(exception, format, a_tuple, b_tuple);
    Py_XDECREF(a_tuple);
    Py_XDECREF(b_tuple);
    return -1;
}

static int check_mask_dtype(PyArrayObject *mask, const char *name)
{
    if (mask == NULL || PyArray_ISBOOL(mask) || array_is_floating(mask))
        return 0;
    PyErr_Format(PyExc_AssertionError, "only bool and floating types of %s are supported", name);
    return -1;
}

/* For batch_first, torch swaps the first two axes before it checks anything else. */
static int check_swappable(const call_arguments *arguments)
{
    if (!arguments->batch_first || PyArray_NDIM(arguments->query) != 3 ||
        (PyArray_NDIM(arguments->key) >= 2 && PyArray_NDIM(arguments->value) >= 2))
        return 0;
    PyErr_SetString(PyExc_IndexError, "Dimension out of range (expected to be in range of [-1, 0], but got 1)");
    return -1;
}

static int check_ranks(const call_arguments *arguments)
{
    const int ndim = PyArray_NDIM(arguments->query);
    if (ndim != 2 && ndim != 3) {
        PyErr_Format(PyExc_AssertionError,
                     "query should be unbatched 2D or batched 3D tensor but received %d-D query tensor", ndim);
        return -1;
    }
    const char *kind = ndim == 3 ? "batched (3-D)" : "unbatched (2-D)";
    const int key_ndim = PyArray_NDIM(arguments->key), value_ndim = PyArray_NDIM(arguments->value);
    if (key_ndim != ndim || value_ndim != ndim) {
        PyErr_Format(PyExc_AssertionError,
                     "For %s `query`, expected `key` and `value` to be %d-D but found %d-D and %d-D tensors "
                     "respectively",
                     kind, ndim, key_ndim, value_ndim);
        return -1;
    }
    const PyArrayObject *mask = arguments->key_padding_mask;
    if (mask != NULL && PyArray_NDIM(mask) != ndim - 1) {
        PyErr_Format(PyExc_AssertionError,
                     "For %s `query`, expected `key_padding_mask` to be `None` or %d-D but found %d-D tensor instead",
                     kind, ndim - 1, PyArray_NDIM(mask));
        return -1;
    }
    mask = arguments->attn_mask;
    if (mask != NULL && PyArray_NDIM(mask) != 2 && PyArray_NDIM(mask) != 3) {
        PyErr_Format(PyExc_AssertionError,
                     "For %s `query`, expected `attn_mask` to be `None`, 2-D or 3-D but found %d-D tensor instead",
                     kind, PyArray_NDIM(mask));
        return -1;
    }
    return 0;
}

/* The ranks must be right. An input without a batch axis is a batch of one. */
static void find_shape(const call_arguments *arguments, PyArrayObject *array, npy_intp shape[3])
{
    const npy_intp *dims = PyArray_DIMS(array);
    const bool swap = arguments->is_batched && arguments->batch_first;
    shape[LENGTH] = dims[swap ? 1 : 0];
    shape[BATCH] = arguments->is_batched ? dims[swap ? 0 : 1] : 1;
    shape[FEATURES] = dims[arguments->is_batched ? 2 : 1];
}

static int check_unbatched_attn_mask(const call_arguments *arguments)
{
    PyArrayObject *mask = arguments->attn_mask;
    if (arguments->is_batched || mask == NULL || PyArray_NDIM(mask) != 3)
        return 0;
    const npy_intp expected[] = {(npy_intp)arguments->weights->widths.H, arguments->query_shape[LENGTH],
                                 arguments->key_shape[LENGTH]};
    if (array_has_shape(mask, 3, expected))
        return 0;
    return raise_shapes(PyExc_AssertionError, "Expected `attn_mask` shape to be %R but got %R", 3, expected, 3,
                        PyArray_DIMS(mask));
}

/* Whether torch would have in_proj_weight instead of three separate weights. */
static bool is_packed(const mha_widths *widths)
{
    return widths->Ek == widths->E && widths->Ev == widths->E;
}

static int check_separate_width(const char *name, size_t rows, size_t width, npy_intp features)
{
    if ((npy_intp)width == features)
        return 0;
    PyErr_Format(PyExc_AssertionError, "expecting %s weights shape of (%zu, %zd), but got (%zu, %zu)", name, rows,
                 features, rows, width);
    return -1;
}

static int check_features(const call_arguments *arguments)
{
    const mha_widths *widths = &arguments->weights->widths;
    const npy_intp *key = arguments->key_shape, *value = arguments->value_shape;
    if (arguments->query_shape[FEATURES] != (npy_intp)widths->E) {
        PyErr_Format(PyExc_AssertionError, "was expecting embedding dimension of %zu, but got %zd", widths->E,
                     arguments->query_shape[FEATURES]);
        return -1;
    }
    const int compared = is_packed(widths) ? 3 : 2;
    if (!PyArray_CompareLists(key, value, compared))
        return raise_shapes(PyExc_AssertionError,
                            compared == 3 ? "key shape %R does not match value shape %R"
                                          : "key's sequence and batch dims %R do not match value's %R",
                            compared, key, compared, value);
    if (is_packed(widths))
        return 0; /* as in torch, check_projections() finds a wrong width */
    if (check_separate_width("key", widths->Hkv * widths->D, widths->Ek, key[FEATURES]) < 0)
        return -1;
    return check_separate_width("value", widths->Hkv * widths->Dv, widths->Ev, value[FEATURES]);
}

static int check_dtype(const call_arguments *arguments, PyArrayObject *array)
{
    if (array_has_dtype(array, arguments->weights->dtype))
        return 0;
    PyErr_Format(PyExc_RuntimeError, "mat1 and mat2 must have the same dtype, but got %s and %s",
                 torch_type_name(array), torch_dtype_name(arguments->weights->dtype));
    return -1;
}

/* The complaints of the three matrix products, one after the other. */
static int check_projections(const call_arguments *arguments)
{
    const mha_widths *widths = &arguments->weights->widths;
    if (check_dtype(arguments, arguments->query) < 0 || check_dtype(arguments, arguments->key) < 0)
        return -1;
    const npy_intp *key = arguments->key_shape;
    if (key[FEATURES] != (npy_intp)widths->Ek) {
        /* torch multiplies once for both if key is value. Without a batch axis it adds one to each, and they are no
         * longer the same. */
        const bool is_shared = arguments->key == arguments->value && arguments->is_batched;
        const size_t columns = widths->Hkv * (is_shared ? widths->D + widths->Dv : widths->D);
        PyErr_Format(PyExc_RuntimeError, "mat1 and mat2 shapes cannot be multiplied (%zdx%zd and %zux%zu)",
                     product(key[LENGTH], key[BATCH]), key[FEATURES], widths->Ek, columns);
        return -1;
    }
    return check_dtype(arguments, arguments->value);
}

static int check_attn_mask(const call_arguments *arguments)
{
    PyArrayObject *mask = arguments->attn_mask;
    if (mask == NULL)
        return 0;
    const npy_intp *query = arguments->query_shape;
    const npy_intp expected[] = {product(query[BATCH], (npy_intp)arguments->weights->widths.H), query[LENGTH],
                                 arguments->key_shape[LENGTH]};
    const int ndim = PyArray_NDIM(mask);
    if (array_has_shape(mask, ndim, expected + 3 - ndim))
        return 0;
    return raise_shapes(PyExc_RuntimeError,
                        ndim == 2 ? "The shape of the 2D attn_mask is %R, but should be %R."
                                  : "The shape of the 3D attn_mask is %R, but should be %R.",
                        ndim, PyArray_DIMS(mask), ndim, expected + 3 - ndim);
}

/* Key and value agree with each other here. torch does not check their batch if static ones replace both. */
static int check_batch(const call_arguments *arguments)
{
    const mha_widths *widths = &arguments->weights->widths;
    const npy_intp *key = arguments->key_shape, N = arguments->query_shape[BATCH];
    if (key[BATCH] == N || (arguments->static_k != NULL && arguments->static_v != NULL))
        return 0;
    if (arguments->weights->has_bias_kv) {
        PyErr_Format(PyExc_RuntimeError,
                     "Sizes of tensors must match except in dimension 0. Expected size %zd but got size %zd for "
                     "tensor number 1 in the list.",
                     key[BATCH], N);
        return -1;
    }
    if (key[LENGTH] == 0) /* torch accepts this, because there are no keys that could disagree */
        return 0;
    PyErr_Format(PyExc_RuntimeError, "shape '[%zd, %zd, %zu]' is invalid for input of size %zd", key[LENGTH],
                 product(N, (npy_intp)widths->Hkv), widths->D,
                 product(product(key[LENGTH], key[BATCH]), (npy_intp)(widths->Hkv * widths->D)));
    return -1;
}

static int check_static(const call_arguments *arguments, PyArrayObject *array, const char *letter, size_t heads,
                        size_t features)
{
    const npy_intp N = arguments->query_shape[BATCH];
    if (array == NULL)
        return 0;
    const int ndim = PyArray_NDIM(array);
    const npy_intp *shape = PyArray_DIMS(array), first = product(N, (npy_intp)heads);
    if (ndim > 0 && shape[0] != first)
        PyErr_Format(PyExc_AssertionError, "expecting static_%s.size(0) of %zd, but got %zd", letter, first, shape[0]);
    else if (ndim < 3)
        PyErr_Format(PyExc_IndexError, "Dimension out of range (expected to be in range of [%d, %d], but got 2)",
                     ndim ? -ndim : -1, ndim ? ndim - 1 : 0);
    else if (shape[2] != (npy_intp)features)
        PyErr_Format(PyExc_AssertionError, "expecting static_%s.size(2) of %zu, but got %zd", letter, features,
                     shape[2]);
    else if (ndim > 3)
        PyErr_Format(PyExc_RuntimeError, "static_%s must be a 3D tensor", letter);
    else if (!array_has_dtype(array, arguments->weights->dtype))
        PyErr_Format(PyExc_RuntimeError, "expected scalar type %s but found %s",
                     torch_dtype_name(arguments->weights->dtype), torch_type_name(array));
    else
        return 0;
    return -1;
}

/* static_k and static_v replace projected keys and values. arguments->S becomes their number. */
static int check_statics(call_arguments *arguments)
{
    const mha_widths *widths = &arguments->weights->widths;
    PyArrayObject *k = arguments->static_k, *v = arguments->static_v;
    if (arguments->weights->has_bias_kv && (k != NULL || v != NULL)) {
        PyErr_Format(PyExc_AssertionError, "bias cannot be added to static %s.", k != NULL ? "key" : "value");
        return -1;
    }
    if (check_batch(arguments) < 0 || check_static(arguments, k, "k", widths->Hkv, widths->D) < 0 ||
        check_static(arguments, v, "v", widths->Hkv, widths->Dv) < 0)
        return -1;
    if (k != NULL)
        arguments->S = PyArray_DIM(k, 1);
    return 0;
}

/* Complaints of torch's multiplications. With static keys, keys, values and attn_mask can differ in length. */
static int check_lengths(const call_arguments *arguments)
{
    const npy_intp S = arguments->S, given = arguments->key_shape[LENGTH], L = arguments->query_shape[LENGTH];
    const npy_intp extra = (npy_intp)mha_extra_keys(arguments->weights->packed, &arguments->call);
    const npy_intp values = arguments->static_v != NULL ? PyArray_DIM(arguments->static_v, 1) : given;
    const npy_intp rows = product(arguments->query_shape[BATCH], (npy_intp)arguments->weights->widths.H);
    const bool is_masked = arguments->attn_mask != NULL && given != S;
    if (is_masked && arguments->key_padding_mask != NULL)
        PyErr_Format(PyExc_RuntimeError,
                     "The size of tensor a (%zd) must match the size of tensor b (%zd) at non-singleton dimension 2",
                     given + extra, S + extra);
    else if (is_masked && arguments->need_weights)
        PyErr_Format(PyExc_RuntimeError,
                     "The expanded size of the tensor (%zd) must match the existing size (%zd) at non-singleton "
                     "dimension 2.  Target sizes: [%zd, %zd, %zd].  Tensor sizes: [%zd, %zd, %zd]",
                     S + extra, given + extra, rows, L, S + extra,
                     PyArray_NDIM(arguments->attn_mask) == 2 ? 1 : rows, L, given + extra);
    else if (values != S && arguments->need_weights)
        PyErr_Format(PyExc_RuntimeError,
                     "Expected size for first two dimensions of batch2 tensor to be: [%zd, %zd] but got: [%zd, %zd].",
                     rows, S + extra, rows, values + extra);
    else if (values != S)
        PyErr_Format(PyExc_RuntimeError, "shape '[%zd, %zu, %zd, %zu]' is invalid for input of size %zd",
                     arguments->query_shape[BATCH], arguments->weights->widths.Hkv, S + extra,
                     arguments->weights->widths.Dv,
                     product(product(rows, values + extra), (npy_intp)arguments->weights->widths.Dv));
    else if (is_masked)
        PyErr_Format(PyExc_RuntimeError,
                     "The size of tensor a (%zd) must match the size of tensor b (%zd) at non-singleton dimension 3",
                     S + extra, given + extra);
    else
        return 0;
    return -1;
}

static int check_key_padding_mask(const call_arguments *arguments)
{
    PyArrayObject *mask = arguments->key_padding_mask;
    if (mask == NULL)
        return 0;
    const npy_intp N = arguments->query_shape[BATCH], S = arguments->S;
    const npy_intp extra = (npy_intp)mha_extra_keys(arguments->weights->packed, &arguments->call);
    const npy_intp mask_N = arguments->is_batched ? PyArray_DIM(mask, 0) : 1;
    const npy_intp mask_S = PyArray_DIM(mask, PyArray_NDIM(mask) - 1);
    if (mask_N == N && mask_S == S)
        return 0;
    /* torch appends a column for each extra key to the mask before this check. */
    const int axis = mask_N != N ? 0 : 1;
    PyErr_Format(PyExc_AssertionError, "Expected key_padded_mask.shape[%d] to be %zd, but got %zd", axis,
                 axis == 0 ? N : S + extra, axis == 0 ? mask_N : mask_S + extra);
    return -1;
}

static int check_dropout(const call_arguments *arguments)
{
    const double p = arguments->dropout_p;
    if (p <= 1)
        return 0;
    static const char format[] = "dropout probability has to be between 0 and 1, but got %s";
    /* torch has two code paths. The one without weights raises another exception and prints as C++ does. */
    const bool is_python = arguments->need_weights || isnan(p);
    char *text = PyOS_double_to_string(p, is_python ? 'r' : 'g', is_python ? 0 : 6, is_python ? Py_DTSF_ADD_DOT_0 : 0,
                                       NULL);
    if (text == NULL)
        return -1;
    PyErr_Format(is_python ? PyExc_ValueError : PyExc_RuntimeError, format, text);
    PyMem_Free(text);
    return -1;
}

int check_arguments(call_arguments *arguments)
{
    if (check_mask_dtype(arguments->key_padding_mask, "key_padding_mask") < 0 ||
        check_mask_dtype(arguments->attn_mask, "attn_mask") < 0 || check_swappable(arguments) < 0 ||
        check_ranks(arguments) < 0)
        return -1;

    arguments->is_batched = PyArray_NDIM(arguments->query) == 3;
    find_shape(arguments, arguments->query, arguments->query_shape);
    find_shape(arguments, arguments->key, arguments->key_shape);
    find_shape(arguments, arguments->value, arguments->value_shape);
    arguments->S = arguments->key_shape[LENGTH];

    if (check_unbatched_attn_mask(arguments) < 0 || check_features(arguments) < 0 ||
        check_projections(arguments) < 0 || check_attn_mask(arguments) < 0 || check_statics(arguments) < 0 ||
        check_key_padding_mask(arguments) < 0 || check_lengths(arguments) < 0 || check_dropout(arguments) < 0)
        return -1;
    return 0;
}
