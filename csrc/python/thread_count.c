/* SPDX-License-Identifier: Apache-2.0
 *
 * thread_count.c - how many threads a call may use.
 * Assumes: the GIL is held. It also protects the counts in the module's state.
 */
#include "thread_count.h"

#include <errno.h>
#include <stdlib.h>

#include "../processors.h"

/* On some systems, finding the usable CPUs means reading files. That is too slow for every call, and they seldom
 * change. */
#define USABLE_CPUS_SECONDS 1.0

/* A positive number at the start of a text, followed by its end or by `separator`. 0 if there is none. */
static size_t parse_count(const char *text, char separator)
{
    char *end;
    errno = 0;
    const long count = strtol(text, &end, 10);
    while (*end == ' ')
        end++;
    return errno == 0 && end != text && count > 0 && (*end == '\0' || *end == separator) ? (size_t)count : 0;
}

int thread_count_init(module_state *state)
{
    const char *own = getenv("MHA_C_NUM_THREADS"), *openmp = getenv("OMP_NUM_THREADS");
    if (own != NULL && *own != '\0') {
        state->environment_threads = parse_count(own, '\0');
        if (state->environment_threads == 0) {
            PyErr_Format(PyExc_ImportError, "MHA_C_NUM_THREADS must be a positive integer, not '%s'", own);
            return -1;
        }
    } else if (openmp != NULL) { /* "4,2": four threads, each of which may start two */
        state->environment_threads = parse_count(openmp, ',');
    }
    state->num_threads = PyContextVar_New("mha_c.num_threads", Py_None);
    return state->num_threads == NULL ? -1 : 0;
}

/* The number of threads that an object stands for. If it is none, returns 0 with an exception in torch's words. */
static size_t count_from_object(PyObject *object)
{
    if (PyBool_Check(object) || !PyIndex_Check(object)) {
        PyErr_Format(PyExc_RuntimeError, "set_num_threads expects an int, but got %s", Py_TYPE(object)->tp_name);
        return 0;
    }
    const Py_ssize_t count = PyNumber_AsSsize_t(object, NULL);
    if (count == -1 && PyErr_Occurred())
        return 0;
    if (count < 1) {
        PyErr_SetString(PyExc_RuntimeError, "set_num_threads expects a positive integer");
        return 0;
    }
    return (size_t)count;
}

static size_t usable_cpus(module_state *state)
{
    const double now = monotonic_seconds();
    if (state->usable_cpus == 0 || now - state->usable_cpus_time > USABLE_CPUS_SECONDS) {
        state->usable_cpus = mha_usable_cpus();
        state->usable_cpus_time = now;
    }
    return state->usable_cpus;
}

size_t thread_count(module_state *state)
{
    PyObject *of_context = NULL;
    if (PyContextVar_Get(state->num_threads, NULL, &of_context) < 0)
        return 0;
    size_t count;
    if (of_context != Py_None)
        count = count_from_object(of_context);
    else if (state->chosen_threads != 0)
        count = state->chosen_threads;
    else if (state->environment_threads != 0)
        count = state->environment_threads;
    else
        count = usable_cpus(state);
    Py_DECREF(of_context);
    return count;
}

PyObject *set_num_threads(PyObject *module, PyObject *n)
{
    const size_t count = count_from_object(n);
    if (count == 0)
        return NULL;
    ((module_state *)PyModule_GetState(module))->chosen_threads = count;
    Py_RETURN_NONE;
}

PyObject *get_num_threads(PyObject *module, PyObject *no_arguments)
{
    (void)no_arguments;
    const size_t count = thread_count(PyModule_GetState(module));
    return count == 0 ? NULL : PyLong_FromSize_t(count);
}
