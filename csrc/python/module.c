/* SPDX-License-Identifier: Apache-2.0
 *
 * module.c - the module mha_c._core: its functions, its state, its initialisation and its end.
 *
 * Owns: the forward call from Python to the core and back.
 */
#include "module.h"

#include "../cpu.h"
#include "../processors.h"
#include "../spare.h"
#include "advised_function.h"
#include "arguments.h"
#include "arrays.h"
#include "block.h"
#include "docstrings.h"
#include "linear_type.h"
#include "norm.h"
#include "run.h"
#include "sample.h"
#include "sdpa.h"
#include "stages.h"
#include "thread_count.h"
#include "torch_checks.h"

static PyObject *forward(PyObject *module, PyObject *const *objects, Py_ssize_t count)
{
    module_state *state = PyModule_GetState(module);
    call_arguments arguments = {0};
    PyObject *result = NULL;

    if (count != CALL_COUNT && count != FORWARD_COUNT) {
        PyErr_Format(PyExc_TypeError, "forward expected %d or %d arguments, got %zd", (int)CALL_COUNT,
                     (int)FORWARD_COUNT, count);
        goto done;
    }
    if (collect_arguments(state, objects, count, &arguments) < 0 || check_arguments(&arguments) < 0) {
        mark_refused();
        goto done;
    }
    if (prepare_call(&arguments) < 0 || run_forward(state, &arguments) < 0)
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
    {"normalize", (PyCFunction)(void (*)(void))normalize, METH_FASTCALL, normalize_doc},
    {"transform", (PyCFunction)(void (*)(void))transform, METH_FASTCALL, transform_doc},
    {"linear", (PyCFunction)(void (*)(void))linear, METH_FASTCALL, linear_map_doc},
    {"activate", (PyCFunction)(void (*)(void))activate, METH_FASTCALL, activate_doc},
    {"project", (PyCFunction)(void (*)(void))project, METH_FASTCALL, project_doc},
    {"scores", (PyCFunction)(void (*)(void))scores, METH_FASTCALL, scores_doc},
    {"attend", (PyCFunction)(void (*)(void))attend, METH_FASTCALL, attend_doc},
    {"takes_few_queries", (PyCFunction)(void (*)(void))takes_few_queries, METH_FASTCALL, takes_few_queries_doc},
    {"sample", sample, METH_O, sample_doc},
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

static int add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **type)
{
    *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *type == NULL ? -1 : PyModule_AddType(module, *type);
}

static int module_exec(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    const char *reason = NULL;
    if (import_numpy() < 0)
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
        intern("filled", &state->filled_name) < 0 || intern("ident", &state->ident_name) < 0 ||
        thread_count_init(state) < 0)
        return -1;

    if (add_type(module, &weights_type_spec, &state->weights_type) < 0 ||
        add_type(module, &linear_type_spec, &state->linear_type) < 0 ||
        add_type(module, &advised_function_spec, &state->advised_function_type) < 0)
        return -1;
    return PyModule_AddObjectRef(module, "num_threads", state->num_threads);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    const module_state *state = PyModule_GetState(module);
    Py_VISIT(state->weights_type);
    Py_VISIT(state->linear_type);
    Py_VISIT(state->advised_function_type);
    Py_VISIT(state->from_dlpack);
    Py_VISIT(state->main_thread);
    Py_VISIT(state->num_threads);
    return 0;
}

static int module_clear(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->weights_type);
    Py_CLEAR(state->linear_type);
    Py_CLEAR(state->advised_function_type);
    Py_CLEAR(state->from_dlpack);
    Py_CLEAR(state->main_thread);
    Py_CLEAR(state->num_threads);
    Py_CLEAR(state->array_name);
    Py_CLEAR(state->array_interface_name);
    Py_CLEAR(state->array_struct_name);
    Py_CLEAR(state->dlpack_name);
    Py_CLEAR(state->filled_name);
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
