/* SPDX-License-Identifier: Apache-2.0
 *
 * module.c - the module mha_c._core: its functions, its state, its initialisation and its end.
 *
 * Owns: the forward call from Python to the core and back. It has the one place where the GIL is released for a call,
 * and the one switch that turns a status of the core into an exception.
 */
#define MHA_IMPORT_NUMPY
#include "module.h"

#include <time.h>

#include "../cpu.h"
#include "../processors.h"
#include "../spare.h"
#include "arguments.h"
#include "arrays.h"
#include "docstrings.h"
#include "sdpa.h"
#include "stages.h"
#include "thread_count.h"

/* A call that takes about 20 us keeps the GIL: to release it and wait for it again may cost more. Above about 50 us a
 * call may use threads: waking a thread takes about as long. Small calls run at about 20 GFLOP/s, others at 50. */
#define OPERATIONS_WITHOUT_GIL 4e5
#define OPERATIONS_WITH_THREADS 2.5e6

/* Every thread has a share of the workspace. A number of threads beyond any machine's must not exhaust the memory. */
enum { MAX_THREADS = 1024 };

/* How often a long call checks for signals. A person who presses Ctrl-C does not notice the delay. */
#define SIGNAL_SECONDS 0.05

double monotonic_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
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

typedef struct {
    PyThreadState *thread; /* the caller, while it does not hold the GIL */
    double next_look;
} signal_watch;

/* mha_stop.should_stop: true after a signal handler raised an exception, usually KeyboardInterrupt. */
static bool check_signals(void *context)
{
    signal_watch *watch = context;
    const double now = monotonic_seconds();
    if (now < watch->next_look)
        return false;
    watch->next_look = now + SIGNAL_SECONDS;
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
        *threads = allowed < MAX_THREADS ? allowed : MAX_THREADS;
    }
    const int watches_signals = is_main_thread(state);
    if (watches_signals < 0)
        return -1;

    signal_watch watch = {.next_look = monotonic_seconds() + SIGNAL_SECONDS};
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

static mha_status start_forward(const void *call)
{
    const call_arguments *arguments = call;
    return mha_forward(arguments->weights->packed, &arguments->call);
}

int run_forward(module_state *state, call_arguments *arguments)
{
    mha_call *call = &arguments->call;
    PyArrayObject *const arrays[] = {arguments->query, arguments->key, arguments->value, arguments->key_padding_mask,
                                     arguments->attn_mask, arguments->static_k, arguments->static_v, arguments->output};
    return run_core(state, mha_forward_operations(arguments->weights->packed, call), &call->threads, &call->stop,
                    arrays, sizeof arrays / sizeof *arrays, start_forward, arguments);
}

static PyObject *forward(PyObject *module, PyObject *const *objects, Py_ssize_t count)
{
    module_state *state = PyModule_GetState(module);
    call_arguments arguments = {0};
    PyObject *result = NULL;

    if (count != ARGUMENT_STATIC_K && count != ARGUMENT_COUNT) {
        PyErr_Format(PyExc_TypeError, "forward expected %d or %d arguments, got %zd", (int)ARGUMENT_STATIC_K,
                     (int)ARGUMENT_COUNT, count);
        goto done;
    }
    if (collect_arguments(state, objects, count, &arguments) < 0 || check_arguments(&arguments) < 0 ||
        prepare_call(&arguments) < 0 || run_forward(state, &arguments) < 0)
        goto done;
    result = hand_back(&arguments);
done:
    release_arguments(&arguments);
    return result;
}

static PyObject *supported_levels(void)
{
    PyObject *levels = PyList_New(0);
    const char *name;
    for (size_t i = 0; levels != NULL && (name = mha_cpu_supported(i)) != NULL; i++) {
        PyObject *level = PyUnicode_FromString(name);
        if (level == NULL || PyList_Append(levels, level) < 0)
            Py_CLEAR(levels);
        Py_XDECREF(level);
    }
    return levels;
}

static PyObject *config(PyObject *module, PyObject *no_arguments)
{
    (void)no_arguments;
#if defined(__clang__)
    static const char compiler[] = __VERSION__;
#else
    static const char compiler[] = "GCC " __VERSION__;
#endif
    PyObject *result = NULL;
    PyObject *levels = supported_levels();
    const size_t threads = thread_count(PyModule_GetState(module));
    if (levels != NULL && threads != 0)
        result = Py_BuildValue("{s:s, s:O, s:n, s:n, s:s, s:s}", "cpu_level", mha_cpu_name(), "cpu_levels", levels,
                               "threads", (Py_ssize_t)threads, "usable_cpus", (Py_ssize_t)mha_usable_cpus(),
                               "compiler", compiler, "numpy", MHA_C_NUMPY_VERSION);
    Py_XDECREF(levels);
    return result;
}

static PyMethodDef module_methods[] = {
    {"forward", (PyCFunction)(void (*)(void))forward, METH_FASTCALL, forward_doc},
    {"scaled_dot_product_attention", (PyCFunction)(void (*)(void))scaled_dot_product_attention, METH_FASTCALL,
     scaled_dot_product_attention_doc},
    {"project", (PyCFunction)(void (*)(void))project, METH_FASTCALL, project_doc},
    {"scores", (PyCFunction)(void (*)(void))scores, METH_FASTCALL, scores_doc},
    {"attend", (PyCFunction)(void (*)(void))attend, METH_FASTCALL, attend_doc},
    {"takes_few_queries", (PyCFunction)(void (*)(void))takes_few_queries, METH_FASTCALL, takes_few_queries_doc},
    {"set_num_threads", set_num_threads, METH_O, set_num_threads_doc},
    {"get_num_threads", get_num_threads, METH_NOARGS, get_num_threads_doc},
    {"config", config, METH_NOARGS, config_doc},
    {NULL, NULL, 0, NULL},
};

/* *attribute = import module; getattr(module, name) */
static int import_attribute(const char *module_name, const char *name, PyObject **attribute)
{
    PyObject *module = PyImport_ImportModule(module_name);
    if (module == NULL)
        return -1;
    *attribute = PyObject_GetAttrString(module, name);
    Py_DECREF(module);
    return *attribute == NULL ? -1 : 0;
}

static int intern(const char *text, PyObject **name)
{
    *name = PyUnicode_InternFromString(text);
    return *name == NULL ? -1 : 0;
}

static int module_exec(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    const char *reason = NULL;
    if (PyArray_ImportNumPyAPI() < 0)
        return -1;
    if (!mha_cpu_init(&reason)) {
        PyErr_SetString(PyExc_ImportError, reason);
        return -1;
    }
    if (import_attribute("numpy", "from_dlpack", &state->from_dlpack) < 0 ||
        import_attribute("threading", "main_thread", &state->main_thread) < 0 ||
        intern("__array__", &state->array_name) < 0 ||
        intern("__array_interface__", &state->array_interface_name) < 0 ||
        intern("__array_struct__", &state->array_struct_name) < 0 || intern("__dlpack__", &state->dlpack_name) < 0 ||
        intern("ident", &state->ident_name) < 0 || thread_count_init(state) < 0)
        return -1;

    state->weights_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &weights_type_spec, NULL);
    if (state->weights_type == NULL || PyModule_AddType(module, state->weights_type) < 0)
        return -1;
    return PyModule_AddObjectRef(module, "num_threads", state->num_threads);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    const module_state *state = PyModule_GetState(module);
    Py_VISIT(state->weights_type);
    Py_VISIT(state->from_dlpack);
    Py_VISIT(state->main_thread);
    Py_VISIT(state->num_threads);
    return 0;
}

static int module_clear(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->weights_type);
    Py_CLEAR(state->from_dlpack);
    Py_CLEAR(state->main_thread);
    Py_CLEAR(state->num_threads);
    Py_CLEAR(state->array_name);
    Py_CLEAR(state->array_interface_name);
    Py_CLEAR(state->array_struct_name);
    Py_CLEAR(state->dlpack_name);
    Py_CLEAR(state->ident_name);
    return 0;
}

static void module_free(void *module)
{
    module_clear(module);
    mha_free_spare();
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#ifdef Py_mod_multiple_interpreters
    /* NumPy's C-API is one table per process, and NumPy runs in the main interpreter only. */
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
#ifdef Py_mod_gil
    /* The GIL protects the numbers of threads in the state. It also keeps arrays from changing between the checks and
     * the call. */
    {Py_mod_gil, Py_MOD_GIL_USED},
#endif
    {0, NULL},
};

static PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "mha_c._core",
    .m_doc = "The C extension: the forward pass, its packed parameters and the thread pool.",
    .m_size = sizeof(module_state),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&module_definition);
}
