/* SPDX-License-Identifier: Apache-2.0
 *
 * block.c - a layer of a Transformer: the arguments of forward(), and those of the rest of the layer.
 *
 * Owns: nothing. call_arguments holds the references. Norms and linear maps are borrowed from the caller's arguments.
 */
#include "block.h"

#include "arguments.h"
#include "arrays.h"
#include "linear_type.h"
#include "run.h"
#include "torch_checks.h"

enum {
    BEFORE_BLOCK = CALL_COUNT - 1,
#define NUMBER(number, name) BLOCK_##number,
    BLOCK_ARGUMENTS(NUMBER)
#undef NUMBER
    BLOCK_COUNT
};

/* A norm is a tuple (weight, bias, eps, is_rms). The parameters are checked when no more Python code runs. */
static int collect_norm(PyObject *object, mha_norm *norm)
{
    if (!PyTuple_CheckExact(object) || PyTuple_GET_SIZE(object) != 4) {
        PyErr_SetString(PyExc_TypeError, "a norm must be a tuple (weight, bias, eps, is_rms)");
        return -1;
    }
    norm->eps = PyFloat_AsDouble(PyTuple_GET_ITEM(object, 2));
    if (norm->eps == -1 && PyErr_Occurred())
        return -1;
    return collect_flag(PyTuple_GET_ITEM(object, 3), "is_rms", &norm->is_rms);
}

/* A parameter of a norm: None, or an array of E numbers. */
static int check_norm_parameter(const call_arguments *arguments, PyObject *object, PyArrayObject **array,
                                const void **numbers)
{
    const npy_intp E = (npy_intp)arguments->weights->widths.E;
    if (object == Py_None)
        return 0;
    if (!PyArray_Check(object) || !array_has_dtype((PyArrayObject *)object, arguments->weights->dtype) ||
        !array_has_shape((PyArrayObject *)object, 1, &E) || !PyArray_ISCARRAY_RO((PyArrayObject *)object)) {
        PyErr_Format(PyExc_ValueError, "the parameters of a norm must be C-contiguous arrays of the layer's dtype and "
                                       "of the shape (%zd,)", E);
        return -1;
    }
    *array = as_computed((PyArrayObject *)object);
    if (*array == NULL)
        return -1;
    *numbers = PyArray_DATA(*array);
    return 0;
}

static int check_norm(call_arguments *arguments, PyObject *object, size_t first, mha_norm *norm)
{
    PyArrayObject **arrays = &arguments->norms[first];
    return check_norm_parameter(arguments, PyTuple_GET_ITEM(object, 0), &arrays[0], &norm->weight) < 0 ||
                   check_norm_parameter(arguments, PyTuple_GET_ITEM(object, 1), &arrays[1], &norm->bias) < 0
               ? -1
               : 0;
}

static int collect_linear(const module_state *state, PyObject *object, const char *name, const linear_object **linear)
{
    *linear = NULL;
    if (object == Py_None)
        return 0;
    if (!Py_IS_TYPE(object, state->linear_type)) {
        PyErr_Format(PyExc_TypeError, "%s must be a Linear or None, not %s", name, Py_TYPE(object)->tp_name);
        return -1;
    }
    *linear = (const linear_object *)object;
    return 0;
}

/* The widths have to fit each other. The layers in Python see to that. */
static int check_widths(const call_arguments *arguments, const mha_block *block, const linear_object *linear1,
                        const linear_object *linear2)
{
    const mha_widths *w = &arguments->weights->widths;
    const npy_intp E = (npy_intp)w->E;
    bool fits = w->Eo == w->E && (linear1 == NULL) == (linear2 == NULL);
    if (fits && linear1 != NULL)
        fits = linear1->dtype == arguments->weights->dtype && linear2->dtype == linear1->dtype && linear1->depth == E &&
               linear2->features == E && linear1->features == (block->is_gated ? 2 : 1) * linear2->depth;
    if (!fits)
        PyErr_SetString(PyExc_ValueError, "the layer's parts must have one dtype, and widths that fit each other");
    return fits ? 0 : -1;
}

static int collect_block(const module_state *state, PyObject *const *objects, call_arguments *arguments,
                         mha_block *block)
{
    const linear_object *linear1, *linear2;
    if (collect_flag(objects[BLOCK_NORM_FIRST], "norm_first", &block->norm_first) < 0 ||
        collect_flag(objects[BLOCK_IS_SELF_ATTENTION], "is_self_attention", &block->is_self_attention) < 0 ||
        collect_flag(objects[BLOCK_IS_GATED], "is_gated", &block->is_gated) < 0 ||
        collect_flag(objects[BLOCK_ZEROES_PADDING], "zeroes_padding", &block->zeroes_padding) < 0 ||
        collect_activation(objects[BLOCK_ACTIVATION], &block->activation) < 0 ||
        collect_linear(state, objects[BLOCK_LINEAR1], "linear1", &linear1) < 0 ||
        collect_linear(state, objects[BLOCK_LINEAR2], "linear2", &linear2) < 0 ||
        collect_norm(objects[BLOCK_ATTENTION_NORM], &block->attention_norm) < 0 ||
        collect_norm(objects[BLOCK_FEED_FORWARD_NORM], &block->feed_forward_norm) < 0)
        return -1;
    const bool is_one = arguments->key == arguments->query && arguments->value == arguments->query;
    if ((block->is_self_attention && !is_one) || (block->zeroes_padding && !block->is_self_attention) ||
        arguments->need_weights) {
        PyErr_SetString(PyExc_ValueError, "self-attention needs one input, zeroes_padding needs self-attention, and "
                                          "there are no weights");
        return -1;
    }
    block->linear1 = linear1 == NULL ? NULL : linear1->packed;
    block->linear2 = linear2 == NULL ? NULL : linear2->packed;
    return check_widths(arguments, block, linear1, linear2);
}

/* The core reads the query's features side by side. Another array is copied. */
static int make_query_adjacent(call_arguments *arguments)
{
    PyArrayObject *query = arguments->query;
    const int ndim = PyArray_NDIM(query);
    if (ndim == 0 || (PyArray_STRIDE(query, ndim - 1) == PyArray_ITEMSIZE(query) && PyArray_ISALIGNED(query)))
        return 0;
    if (check_arguments(arguments) < 0) /* before a copy that may be large, and again after it */
        return -1;
    PyArrayObject *copy = (PyArrayObject *)PyArray_NewCopy(query, NPY_CORDER);
    if (copy == NULL)
        return -1;
    PyArrayObject **const inputs[] = {&arguments->key, &arguments->value};
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++)
        if (*inputs[i] == query)
            Py_SETREF(*inputs[i], (PyArrayObject *)Py_NewRef(copy));
    Py_SETREF(arguments->query, copy);
    return 0;
}

PyObject *transform(PyObject *module, PyObject *const *objects, Py_ssize_t count)
{
    module_state *state = PyModule_GetState(module);
    call_arguments arguments = {0};
    mha_block block = {.linear1 = NULL};
    PyObject *result = NULL;

    if (count != BLOCK_COUNT) {
        PyErr_Format(PyExc_TypeError, "transform expected %d arguments, got %zd", (int)BLOCK_COUNT, count);
        goto done;
    }
    if (collect_arguments(state, objects, CALL_COUNT, &arguments) < 0 ||
        collect_block(state, objects, &arguments, &block) < 0 || make_query_adjacent(&arguments) < 0 ||
        check_norm(&arguments, objects[BLOCK_ATTENTION_NORM], 0, &block.attention_norm) < 0 ||
        check_norm(&arguments, objects[BLOCK_FEED_FORWARD_NORM], 2, &block.feed_forward_norm) < 0 ||
        check_arguments(&arguments) < 0) {
        mark_refused();
        goto done;
    }
    arguments.call.block = &block;
    if (prepare_call(&arguments) < 0 || run_forward(state, &arguments) < 0)
        goto done;
    result = stored_output(&arguments);
done:
    release_arguments(&arguments);
    return result;
}
