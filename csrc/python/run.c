/* SPDX-License-Identifier: Apache-2.0
 *
 * run.c - runs a call of the core for Python.
 *
 * Owns: the one place where the GIL is released for a call, the one switch that turns a status into an exception, and
 * the table of NumPy's C-API.
 */
#define MHA_IMPORT_NUMPY
#include "run.h"

#include "../threads.h"
#include "thread_count.h"

/* A call that takes about 20 us keeps the GIL: to release it and wait for it again may cost more. Above about 50 us a
 * call may use threads: waking a thread takes about as long. Small calls run at about 20 GFLOP/s, others at 50. */
#define OPERATIONS_WITHOUT_GIL 4e5
#define OPERATIONS_WITH_THREADS 2.5e6

/* How often a long call checks for signals. A person who presses Ctrl-C does not notice the delay. */
#define SIGNAL_SECONDS 0.05

int import_numpy(void)
{
    return PyArray_ImportNumPyAPI();
}

int raise_status(mha_status status)
{
    switch (status) {
    case MHA_OK:
        return 0;
    case MHA_STOPPED: /* check_signals() has set the exception, unless a signal handler forked and this is the child */
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_RuntimeError, "this process was forked in the middle of the call, and the threads "
                                                "that were helping stayed behind: call again");
        break;
    case MHA_NO_MEMORY:
        PyErr_NoMemory();
        break;
    case MHA_TOO_LARGE:
        PyErr_SetString(PyExc_MemoryError, "the sizes of these arrays exceed the address space");
        break;
    }
    return -1;
}

void mark_refused(void)
{
    PyObject *type, *exception, *traceback;
    PyErr_Fetch(&type, &exception, &traceback);
    PyErr_NormalizeException(&type, &exception, &traceback);
    if (PyObject_SetAttrString(exception, "refused", Py_True) < 0)
        PyErr_Clear(); /* the exception is right without the mark, too */
    PyErr_Restore(type, exception, traceback);
}

/* The array that owns the memory of an array. It may be the array itself. */
static PyObject *memory_owner(PyArrayObject *array)
{
    PyObject *base;
    while ((base = PyArray_BASE(array)) != NULL && PyArray_Check(base))
        array = (PyArrayObject *)base;
    return (PyObject *)array;
}

PyObject *pin_memory(PyArrayObject *const *arrays, size_t count)
{
    const int collects_garbage = PyGC_Disable(); /* a finalizer might resize an array that is not pinned yet */
    PyObject *pins = PyTuple_New((Py_ssize_t)count);
    for (size_t i = 0; pins != NULL && i < count; i++) {
        PyObject *pin = arrays[i] == NULL ? Py_NewRef(Py_None) : PyWeakref_NewRef(memory_owner(arrays[i]), NULL);
        if (pin == NULL)
            Py_CLEAR(pins);
        else
            PyTuple_SET_ITEM(pins, (Py_ssize_t)i, pin);
    }
    if (collects_garbage)
        PyGC_Enable();
    return pins;
}

typedef struct {
    PyThreadState *thread; /* the caller, while it does not hold the GIL */
    double next_check;
} signal_watch;

/* mha_stop.should_stop: true after a signal handler raised an exception, usually KeyboardInterrupt. */
static bool check_signals(void *context)
{
    signal_watch *watch = context;
    const double now = monotonic_seconds();
    if (now < watch->next_check)
        return false;
    watch->next_check = now + SIGNAL_SECONDS;
    PyEval_RestoreThread(watch->thread);
    const bool raised = PyErr_CheckSignals() < 0;
    watch->thread = PyEval_SaveThread();
    return raised;
}

/* Whether this is Python's main thread, which alone handles signals: 1 or 0, or -1 with an exception. */
static int is_main_thread(const module_state *state)
{
    PyObject *ident = NULL;
    unsigned long main_ident = 0;
    PyObject *thread = PyObject_CallNoArgs(state->main_thread);
    if (thread != NULL)
        ident = PyObject_GetAttr(thread, state->ident_name);
    if (ident != NULL)
        main_ident = PyLong_AsUnsignedLong(ident);
    Py_XDECREF(thread);
    Py_XDECREF(ident);
    return PyErr_Occurred() ? -1 : main_ident == PyThread_get_thread_ident();
}

/* No Python code ran between the checks and here. __index__, signal handlers and other threads may run from now on. */
static int run_pinned(module_state *state, double operations, size_t *threads, mha_stop *stop,
                      mha_status (*start)(const void *call), const void *call)
{
    if (operations >= OPERATIONS_WITH_THREADS) {
        const size_t allowed = thread_count(state);
        if (allowed == 0)
            return -1;
        *threads = mha_smaller(allowed, MHA_MAX_THREADS);
    }
    const int watches_signals = is_main_thread(state);
    if (watches_signals < 0)
        return -1;

    signal_watch watch = {.next_check = monotonic_seconds() + SIGNAL_SECONDS};
    if (watches_signals)
        *stop = (mha_stop){.should_stop = check_signals, .context = &watch};
    watch.thread = PyEval_SaveThread();
    const mha_status status = start(call);
    PyEval_RestoreThread(watch.thread);
    *stop = (mha_stop){.should_stop = NULL};
    return raise_status(status);
}

int run_core(module_state *state, double operations, size_t *threads, mha_stop *stop, PyArrayObject *const *arrays,
             size_t count, mha_status (*start)(const void *call), const void *call)
{
    *threads = 1;
    if (operations < OPERATIONS_WITHOUT_GIL)
        return raise_status(start(call));
    PyObject *pins = pin_memory(arrays, count);
    if (pins == NULL)
        return -1;
    const int result = run_pinned(state, operations, threads, stop, start, call);
    Py_DECREF(pins);
    return result;
}
