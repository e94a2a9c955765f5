/* SPDX-License-Identifier: Apache-2.0
 *
 * advised_function.c - AdvisedFunction: calls a Python function, and does no more than that unless a call with keywords
 * raises TypeError. It is here because Python refuses an unknown keyword before the function runs, and a wrapper in
 * Python would cost every call a tenth of a microsecond or more.
 *
 * Owns: the two functions, and the attributes that functools.update_wrapper() copies.
 */
#include "advised_function.h"

#include <stddef.h>
#include <structmember.h>

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *function, *advise, *attributes, *weak_references;
} advised_function;

/* {name: value} of the keywords of a call, whose values follow the positional arguments. */
static PyObject *collect_keywords(PyObject *const *values, PyObject *names)
{
    PyObject *keywords = PyDict_New();
    for (Py_ssize_t i = 0; keywords != NULL && i < PyTuple_GET_SIZE(names); i++)
        if (PyDict_SetItem(keywords, PyTuple_GET_ITEM(names, i), values[i]) < 0)
            Py_CLEAR(keywords);
    return keywords;
}

static PyObject *call(PyObject *callable, PyObject *const *arguments, size_t count, PyObject *names)
{
    const advised_function *self = (const advised_function *)callable;
    PyObject *result = PyObject_Vectorcall(self->function, arguments, count, names);
    if (result != NULL || names == NULL || !PyErr_ExceptionMatches(PyExc_TypeError))
        return result;

    PyObject *type, *error, *traceback, *advised = NULL;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    PyObject *keywords = collect_keywords(arguments + PyVectorcall_NARGS(count), names);
    if (keywords != NULL)
        advised = PyObject_CallFunctionObjArgs(self->advise, error, keywords, NULL);
    Py_XDECREF(keywords);
    Py_XDECREF(advised);
    PyErr_Restore(type, error, traceback); /* in the place of what the advice may have raised */
    return NULL;
}

/* As a function's: bound to the instance through which it is looked up. */
static PyObject *get(PyObject *self, PyObject *instance, PyObject *owner)
{
    (void)owner;
    return instance == NULL ? Py_NewRef(self) : PyMethod_New(self, instance);
}

static PyObject *create(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *function, *advise;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) != 0) {
        PyErr_SetString(PyExc_TypeError, "AdvisedFunction() takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OO:AdvisedFunction", &function, &advise))
        return NULL;
    advised_function *self = (advised_function *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->vectorcall = call;
    self->function = Py_NewRef(function);
    self->advise = Py_NewRef(advise);
    return (PyObject *)self;
}

static int traverse(PyObject *object, visitproc visit, void *arg)
{
    const advised_function *self = (const advised_function *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->function);
    Py_VISIT(self->advise);
    Py_VISIT(self->attributes);
    return 0;
}

static int clear(PyObject *object)
{
    advised_function *self = (advised_function *)object;
    Py_CLEAR(self->function);
    Py_CLEAR(self->advise);
    Py_CLEAR(self->attributes);
    return 0;
}

static void dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    PyObject_ClearWeakRefs(object);
    clear(object);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyObject *repr(PyObject *self)
{
    return PyObject_Repr(((const advised_function *)self)->function);
}

/* As a function is pickled: by its name, under which its module has it. */
static PyObject *reduce(PyObject *self, PyObject *no_arguments)
{
    (void)no_arguments;
    return PyObject_GetAttrString(self, "__qualname__");
}

PyDoc_STRVAR(advised_function_doc,
             "AdvisedFunction(function, advise, /)\n--\n\n"
             "Calling it calls the function. If a call with keywords raises TypeError, advise(error, keywords) may\n"
             "add to the error; what advise raises itself is dropped.");

static PyMethodDef methods[] = {
    {"__reduce__", reduce, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(advised_function, vectorcall), READONLY, NULL},
    {"__dictoffset__", T_PYSSIZET, offsetof(advised_function, attributes), READONLY, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(advised_function, weak_references), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)advised_function_doc},
    {Py_tp_new, create},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_descr_get, get},
    {Py_tp_repr, repr},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_getset, getset},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_dealloc, dealloc},
    {0, NULL},
};

PyType_Spec advised_function_spec = {
    .name = "mha_c._core.AdvisedFunction",
    .basicsize = (int)sizeof(advised_function),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR |
             Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
