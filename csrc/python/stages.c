/* SPDX-License-Identifier: Apache-2.0
 *
 * stages.c - intermediate results of the forward pass: projections, scores, the heads' results, the path of each item.
 *
 * Owns: nothing. Each function is one call of the core, and call_arguments holds its references.
 */
#include "stages.h"

#include <string.h>

#include "arguments.h"
#include "arrays.h"
#include "run.h"
#include "torch_checks.h"

/* ---- Whole calls without an output ---- */

/* Makes a call of the core without an output from the arguments of forward(). Returns 0, or -1 with an exception. */
static int prepare(module_state *state, PyObject *const *objects, Py_ssize_t count, Py_ssize_t expected,
                   call_arguments *arguments)
{
    if (count != expected) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
        return -1;
    }
    arguments->without_output = true;
    return collect_arguments(state, objects, CALL_COUNT, arguments) < 0 || check_arguments(arguments) < 0 ||
                   prepare_call(arguments) < 0
               ? -1
               : 0;
}

PyObject *scores(PyObject *module, PyObject *const *objects, Py_ssize_t count)
{
    module_state *state = PyModule_GetState(module);
    call_arguments arguments = {0};
    PyObject *result = NULL;
    if (prepare(state, objects, count, CALL_COUNT, &arguments) < 0)
        goto done;
    if (arguments.call.wanted != MHA_WANT_PROBABILITIES) {
        PyErr_SetString(PyExc_ValueError, "scores are those of each head: they stand in for its weights");
        goto done;
    }
    arguments.call.wanted = MHA_WANT_SCORES;
    if (run_forward(state, &arguments) == 0)
        result = Py_NewRef((PyObject *)arguments.attn_weights);
done:
    release_arguments(&arguments);
    return result;
}

/* Sets call.is_few from an array of N booleans. Returns 0, or -1 with an exception. */
static int read_paths(PyObject *object, call_arguments *arguments)
{
    const npy_intp N = (npy_intp)arguments->call.N;
    PyArrayObject *array = (PyArrayObject *)object;
    if (!PyArray_Check(object) || !PyArray_ISBOOL(array) || !PyArray_ISCARRAY_RO(array) ||
        !array_has_shape(array, 1, &N)) {
        PyErr_SetString(PyExc_ValueError, "paths must be an array of one bool for each batch item");
        return -1;
    }
    arguments->paths = (PyArrayObject *)Py_NewRef(object);
    arguments->call.is_few = PyArray_DATA(array);
    return 0;
}

PyObject *attend(PyObject *module, PyObject *const *objects, Py_ssize_t count)
{
    module_state *state = PyModule_GetState(module);
    call_arguments arguments = {0};
    PyArrayObject *context = NULL;
    PyObject *result = NULL;
    if (prepare(state, objects, count, CALL_COUNT + 1, &arguments) < 0 ||
        read_paths(objects[CALL_COUNT], &arguments) < 0)
        goto done;
    const mha_widths *widths = &arguments.weights->widths;
    const npy_intp shape[] = {(npy_intp)arguments.call.N, (npy_intp)arguments.call.L,
                              (npy_intp)(widths->H * widths->Dv)};
    const int skip = arguments.is_batched ? 0 : 1;
    context = new_array(3 - skip, shape + skip, arguments.weights->dtype);
    if (context == NULL)
        goto done;
    arguments.call.context = mha_contiguous_rows(PyArray_DATA(context), mha_computed_in(arguments.weights->dtype), 1,
                                                 arguments.call.L, widths->H * widths->Dv);
    if (run_forward(state, &arguments) == 0)
        result = PyTuple_Pack(2, context, arguments.attn_weights ? (PyObject *)arguments.attn_weights : Py_None);
done:
    Py_XDECREF(context);
    release_arguments(&arguments);
    return result;
}

PyObject *takes_few_queries(PyObject *module, PyObject *const *objects, Py_ssize_t count)
{
    call_arguments arguments = {0};
    PyObject *paths = NULL;
    if (prepare(PyModule_GetState(module), objects, count, CALL_COUNT, &arguments) == 0) {
        const npy_intp N = (npy_intp)arguments.call.N;
        paths = PyArray_SimpleNew(1, &N, NPY_BOOL);
    }
    if (paths != NULL && raise_status(mha_choose_paths(arguments.weights->packed, &arguments.call,
                                                       PyArray_DATA((PyArrayObject *)paths))) < 0)
        Py_CLEAR(paths);
    release_arguments(&arguments);
    return paths;
}

/* ---- One projection ---- */

enum { PROJECT_WEIGHTS, PROJECT_INPUT, PROJECT_X, PROJECT_BATCH_FIRST, PROJECT_COUNT };

static int read_input(PyObject *object, mha_input *input)
{
    static const char *const names[] = {[MHA_QUERY] = "query", [MHA_KEY] = "key", [MHA_VALUE] = "value"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (is_text(object, names[i])) {
            *input = (mha_input)i;
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "the input must be 'query', 'key' or 'value', not %R", object);
    return -1;
}

static bool is_input_of(const weights_object *weights, PyArrayObject *x, size_t depth)
{
    const int ndim = PyArray_NDIM(x);
    if ((ndim == 2 || ndim == 3) && array_has_dtype(x, weights->dtype) && (size_t)PyArray_DIM(x, ndim - 1) == depth)
        return true;
    PyErr_SetString(PyExc_ValueError, "this is not an input of this layer");
    return false;
}

/* Completes `job` and allocates its result, (N, length, features) or (length, features). NULL with an exception. */
static PyArrayObject *prepare_projection(PyArrayObject *x, bool batch_first, const weights_object *weights,
                                         mha_input_projection *job)
{
    const mha_dtype type = mha_computed_in(weights->dtype);
    const mha_widths *w = &weights->widths;
    const size_t widths[] = {w->H * w->D, w->Hkv * w->D, w->Hkv * w->Dv};
    const int ndim = PyArray_NDIM(x), n = ndim == 3 ? (batch_first ? 0 : 1) : -1, l = n == 0 ? 1 : 0;
    const npy_intp shape[] = {n < 0 ? 1 : PyArray_DIM(x, n), PyArray_DIM(x, l), (npy_intp)widths[job->input]};
    PyArrayObject *y = new_array(ndim, shape + 3 - ndim, weights->dtype);
    if (y == NULL)
        return NULL;
    job->layer = weights->packed;
    job->N = (size_t)shape[0];
    job->length = (size_t)shape[1];
    job->x = (mha_rows){.data = PyArray_DATA(x), .type = type, .item = n < 0 ? 0 : PyArray_STRIDE(x, n),
                        .row = PyArray_STRIDE(x, l), .element = PyArray_STRIDE(x, ndim - 1)};
    job->y = mha_contiguous_rows(PyArray_DATA(y), type, 1, job->length, widths[job->input]);
    return y;
}

static mha_status start_projection(const void *job)
{
    return mha_project_input(job);
}

PyObject *project(PyObject *module, PyObject *const *objects, Py_ssize_t count)
{
    module_state *state = PyModule_GetState(module);
    mha_input_projection job = {0};
    PyArrayObject *x = NULL, *y = NULL;
    if (count != PROJECT_COUNT || !Py_IS_TYPE(objects[PROJECT_WEIGHTS], state->weights_type)) {
        PyErr_SetString(PyExc_TypeError, "project expected Weights, the name of an input, the input, and a flag");
        return NULL;
    }
    bool batch_first;
    if (collect_flag(objects[PROJECT_BATCH_FIRST], "batch_first", &batch_first) < 0 ||
        read_input(objects[PROJECT_INPUT], &job.input) < 0)
        return NULL;
    const weights_object *weights = (const weights_object *)objects[PROJECT_WEIGHTS];
    const size_t depths[] = {weights->widths.E, weights->widths.Ek, weights->widths.Ev};
    x = array_from_object(state, objects[PROJECT_X], "the input");
    if (x != NULL)
        Py_SETREF(x, is_input_of(weights, x, depths[job.input]) ? as_computed(x) : NULL);
    if (x != NULL)
        y = prepare_projection(x, batch_first, weights, &job);
    if (y != NULL) {
        const double rows = (double)job.N * (double)job.length;
        const double depth = (double)PyArray_DIM(x, PyArray_NDIM(x) - 1);
        const double operations = 2 * rows * depth * (double)PyArray_DIM(y, PyArray_NDIM(y) - 1);
        PyArrayObject *const arrays[] = {x, y};
        if (run_core(state, operations, &job.threads, &job.stop, arrays, 2, start_projection, &job) < 0)
            Py_CLEAR(y);
    }
    Py_XDECREF(x);
    return (PyObject *)y;
}
