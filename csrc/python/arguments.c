/* SPDX-License-Identifier: Apache-2.0
 *
 * arguments.c - Python objects to mha_call, the arrays that hold the results, and the way back.
 *
 * Owns: the references in call_arguments. Arrays of the caller are not written to, except out=.
 */
#include "arguments.h"

#include "arrays.h"
#include "run.h"

/* The same object passed twice is converted once, so that the core sees one input. */
static int collect_inputs(const module_state *state, PyObject *const *objects, call_arguments *arguments)
{
    PyObject *query = objects[ARGUMENT_QUERY], *key = objects[ARGUMENT_KEY], *value = objects[ARGUMENT_VALUE];
    if (collect_array(state, query, "query", &arguments->query) < 0)
        return -1;
    if (key == query)
        arguments->key = (PyArrayObject *)Py_NewRef(arguments->query);
    else if (collect_array(state, key, "key", &arguments->key) < 0)
        return -1;
    if (value == key)
        arguments->value = (PyArrayObject *)Py_NewRef(arguments->key);
    else if (value == query)
        arguments->value = (PyArrayObject *)Py_NewRef(arguments->query);
    else if (collect_array(state, value, "value", &arguments->value) < 0)
        return -1;
    return 0;
}

/* Whatever Python takes for true or false, as torch does, but for text: "no" would be true. */
int collect_flag(PyObject *object, const char *name, bool *flag)
{
    if (PyUnicode_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s must be True or False, but got %R", name, object);
        return -1;
    }
    const int truth = PyObject_IsTrue(object);
    *flag = truth == 1;
    return truth < 0 ? -1 : 0;
}

static int collect_number(PyObject *object, uint64_t *number)
{
    *number = PyLong_AsUnsignedLongLong(object);
    return PyErr_Occurred() ? -1 : 0;
}

/* What a query gets that sees no key. torch's answer depends on its code path, and need_weights decides about that. */
static int collect_masked_rows(PyObject *object, bool need_weights, mha_empty_row *empty_row)
{
    if (is_text(object, "torch"))
        *empty_row = need_weights ? MHA_EMPTY_ROW_NAN : MHA_EMPTY_ROW_ZERO;
    else if (is_text(object, "zero"))
        *empty_row = MHA_EMPTY_ROW_ZERO;
    else if (is_text(object, "nan"))
        /* as with weights, for parts of such a call that are computed without weights */
        *empty_row = MHA_EMPTY_ROW_NAN;
    else {
        PyErr_Format(PyExc_ValueError, "masked_rows must be 'torch' or 'zero', not %R", object);
        return -1;
    }
    return 0;
}

int collect_arguments(const module_state *state, PyObject *const *objects, Py_ssize_t count,
                      call_arguments *arguments)
{
    mha_call *call = &arguments->call;
    PyObject *weights = objects[ARGUMENT_WEIGHTS];
    if (!Py_IS_TYPE(weights, state->weights_type)) {
        PyErr_Format(PyExc_TypeError, "weights must be Weights, not %s", Py_TYPE(weights)->tp_name);
        return -1;
    }
    arguments->weights = (const weights_object *)weights;

    arguments->dropout_p = PyFloat_AsDouble(objects[ARGUMENT_DROPOUT_P]);
    if (arguments->dropout_p == -1 && PyErr_Occurred())
        return -1;
    if (collect_flag(objects[ARGUMENT_NEED_WEIGHTS], "need_weights", &arguments->need_weights) < 0 ||
        collect_flag(objects[ARGUMENT_AVERAGE_ATTN_WEIGHTS], "average_attn_weights",
                     &arguments->average_attn_weights) < 0 ||
        collect_flag(objects[ARGUMENT_BATCH_FIRST], "batch_first", &arguments->batch_first) < 0 ||
        collect_flag(objects[ARGUMENT_IS_CAUSAL], "is_causal", &call->is_causal) < 0 ||
        collect_flag(objects[ARGUMENT_ADD_ZERO_ATTN], "add_zero_attn", &call->add_zero_attn) < 0 ||
        collect_masked_rows(objects[ARGUMENT_MASKED_ROWS], arguments->need_weights, &call->empty_row) < 0 ||
        collect_number(objects[ARGUMENT_DROPOUT_SEED], &call->dropout_seed) < 0 ||
        collect_number(objects[ARGUMENT_DROPOUT_CALL], &call->dropout_call) < 0)
        return -1;

    if (collect_inputs(state, objects, arguments) < 0 ||
        collect_mask(state, objects[ARGUMENT_KEY_PADDING_MASK], "key_padding_mask", &arguments->key_padding_mask) < 0 ||
        collect_mask(state, objects[ARGUMENT_ATTN_MASK], "attn_mask", &arguments->attn_mask) < 0)
        return -1;
    if (count == FORWARD_COUNT &&
        (collect_optional(state, objects[ARGUMENT_STATIC_K], "static_k", &arguments->static_k) < 0 ||
         collect_optional(state, objects[ARGUMENT_STATIC_V], "static_v", &arguments->static_v) < 0))
        return -1;
    return out_from_object(state, objects[ARGUMENT_OUT], &arguments->out);
}

/* An array (N, length, features) or (length, N, features), or (length, features) without a batch. */
static mha_rows describe_array(const call_arguments *arguments, PyArrayObject *array, bool batch_first)
{
    const npy_intp *strides = PyArray_STRIDES(array);
    mha_rows rows = {.data = PyArray_DATA(array), .type = mha_computed_in(arguments->weights->dtype)};
    rows.element = strides[PyArray_NDIM(array) - 1];
    rows.row = strides[arguments->is_batched && batch_first ? 1 : 0];
    if (arguments->is_batched)
        rows.item = strides[batch_first ? 0 : 1];
    return rows;
}

/* (N * Hkv, S, features): heads within batch items. The product is unsigned, because an empty array may have any
 * stride. */
static mha_rows describe_projected(const call_arguments *arguments, PyArrayObject *array)
{
    if (array == NULL)
        return (mha_rows){.data = NULL};
    const npy_intp *strides = PyArray_STRIDES(array);
    return (mha_rows){.data = PyArray_DATA(array),
                      .type = mha_computed_in(arguments->weights->dtype),
                      .item = (ptrdiff_t)((size_t)strides[0] * arguments->weights->widths.Hkv),
                      .head = strides[0],
                      .row = strides[1],
                      .element = strides[2]};
}

static void describe_masks(call_arguments *arguments)
{
    mha_call *call = &arguments->call;
    if (arguments->attn_mask != NULL) {
        mha_mask *mask = &call->attn_mask;
        mask->kind = mask_kind(arguments->attn_mask);
        const int ndim = PyArray_NDIM(arguments->attn_mask);
        const npy_intp *strides = PyArray_STRIDES(arguments->attn_mask);
        mask->data = PyArray_DATA(arguments->attn_mask);
        mask->stride_s = strides[ndim - 1];
        mask->stride_l = strides[ndim - 2];
        /* (N * H, L, S): heads within batch items; unsigned, because an empty mask may have any stride */
        if (ndim == 3) {
            mask->stride_h = strides[0];
            mask->stride_n = (ptrdiff_t)((size_t)strides[0] * arguments->weights->widths.H);
        }
    }
    if (arguments->key_padding_mask != NULL) {
        mha_mask *mask = &call->key_padding_mask;
        mask->kind = mask_kind(arguments->key_padding_mask);
        const npy_intp *strides = PyArray_STRIDES(arguments->key_padding_mask);
        mask->data = PyArray_DATA(arguments->key_padding_mask);
        mask->stride_n = arguments->is_batched ? strides[0] : 0;
        mask->stride_s = strides[arguments->is_batched ? 1 : 0];
    }
}

/* Makes the output, without a batch axis if the inputs have none. It is out= itself if the core can write to it. */
static int make_output(call_arguments *arguments)
{
    const mha_widths *widths = &arguments->weights->widths;
    const npy_intp L = arguments->query_shape[0], N = arguments->query_shape[1], Eo = (npy_intp)widths->Eo;
    const bool batch_first = arguments->batch_first || !arguments->is_batched;
    const npy_intp shape[] = {batch_first ? N : L, batch_first ? L : N, Eo};
    const int skip = arguments->is_batched ? 0 : 1, ndim = 3 - skip;
    PyArrayObject *const inputs[] = {arguments->query, arguments->key, arguments->value, arguments->attn_mask,
                                     arguments->key_padding_mask, arguments->static_k, arguments->static_v};

    if (arguments->out != NULL && check_out(arguments->out, arguments->weights->dtype, ndim, shape + skip) < 0)
        return -1;
    if (arguments->out != NULL && !mha_is_half(arguments->weights->dtype) && PyArray_ISCARRAY(arguments->out) &&
        is_apart(arguments->out, inputs, sizeof inputs / sizeof *inputs))
        arguments->output = (PyArrayObject *)Py_NewRef((PyObject *)arguments->out);
    else
        arguments->output = new_array(ndim, shape + skip, arguments->weights->dtype);
    if (arguments->output == NULL)
        return -1;
    arguments->call.output = describe_array(arguments, arguments->output, batch_first);
    return 0;
}

static int make_attn_weights(call_arguments *arguments)
{
    mha_call *call = &arguments->call;
    if (!arguments->need_weights)
        return 0;
    npy_intp shape[4] = {(npy_intp)call->N};
    int ndim = 1;
    if (!arguments->average_attn_weights)
        shape[ndim++] = (npy_intp)arguments->weights->widths.H;
    shape[ndim++] = (npy_intp)call->L;
    shape[ndim++] = (npy_intp)(call->S + mha_extra_keys(arguments->weights->packed, call));

    const int skip = arguments->is_batched ? 0 : 1;
    arguments->attn_weights = new_array(ndim - skip, shape + skip, arguments->weights->dtype);
    if (arguments->attn_weights == NULL)
        return -1;
    call->attn_weights = PyArray_DATA(arguments->attn_weights);
    call->wanted = arguments->average_attn_weights ? MHA_WANT_AVERAGES : MHA_WANT_PROBABILITIES;
    return 0;
}

int prepare_call(call_arguments *arguments)
{
    mha_call *call = &arguments->call;
    PyArrayObject **const inputs[] = {&arguments->query, &arguments->key, &arguments->value, &arguments->static_k,
                                      &arguments->static_v};
    if (mha_is_half(arguments->weights->dtype) && take_computed(inputs, sizeof inputs / sizeof *inputs) < 0)
        return -1;
    call->L = (size_t)arguments->query_shape[0];
    call->N = (size_t)arguments->query_shape[1];
    call->S = (size_t)arguments->S;
    call->query = describe_array(arguments, arguments->query, arguments->batch_first);
    call->key = describe_array(arguments, arguments->key, arguments->batch_first);
    call->value = describe_array(arguments, arguments->value, arguments->batch_first);
    call->static_k = describe_projected(arguments, arguments->static_k);
    call->static_v = describe_projected(arguments, arguments->static_v);
    /* torch drops nothing for a negative number */
    call->dropout_p = arguments->dropout_p > 0 ? arguments->dropout_p : 0;
    describe_masks(arguments);
    if ((!arguments->without_output && make_output(arguments) < 0) || make_attn_weights(arguments) < 0)
        return -1;
    return 0;
}

static mha_status start_forward(const void *call)
{
    const call_arguments *arguments = call;
    return mha_forward(arguments->weights->packed, &arguments->call);
}

int run_forward(module_state *state, call_arguments *arguments)
{
    mha_call *call = &arguments->call;
    PyArrayObject *const arrays[] = {arguments->query, arguments->key, arguments->value, arguments->key_padding_mask,
                                     arguments->attn_mask, arguments->static_k, arguments->static_v, arguments->paths,
                                     arguments->output, arguments->norms[0], arguments->norms[1], arguments->norms[2],
                                     arguments->norms[3]};
    return run_core(state, mha_forward_operations(arguments->weights->packed, call), &call->threads, &call->stop,
                    arrays, sizeof arrays / sizeof *arrays, start_forward, arguments);
}

PyObject *stored_output(const call_arguments *arguments)
{
    const weights_object *weights = arguments->weights;
    return as_stored(arguments->output, weights->descr, arguments->out);
}

/* The weights as the caller gets them; None if they are not wanted. */
static PyObject *stored_attn_weights(const call_arguments *arguments)
{
    const weights_object *weights = arguments->weights;
    if (arguments->attn_weights == NULL)
        return Py_NewRef(Py_None);
    return as_stored(arguments->attn_weights, weights->descr, NULL);
}

PyObject *hand_back(const call_arguments *arguments)
{
    PyObject *output = stored_output(arguments), *result = NULL;
    PyObject *attn_weights = output == NULL ? NULL : stored_attn_weights(arguments);
    if (attn_weights != NULL)
        result = PyTuple_Pack(2, output, attn_weights);
    Py_XDECREF(output);
    Py_XDECREF(attn_weights);
    return result;
}

void release_arguments(call_arguments *arguments)
{
    Py_XDECREF(arguments->query);
    Py_XDECREF(arguments->key);
    Py_XDECREF(arguments->value);
    Py_XDECREF(arguments->key_padding_mask);
    Py_XDECREF(arguments->attn_mask);
    Py_XDECREF(arguments->static_k);
    Py_XDECREF(arguments->static_v);
    Py_XDECREF(arguments->paths);
    Py_XDECREF(arguments->output);
    Py_XDECREF(arguments->attn_weights);
    for (size_t i = 0; i < sizeof arguments->norms / sizeof *arguments->norms; i++)
        Py_XDECREF(arguments->norms[i]);
}
