/* SPDX-License-Identifier: Apache-2.0
 *
 * dlpack.c - reads the capsules of DLPack that hold bfloat16. The structs are those of the standard, version 1.
 *
 * Owns: what a capsule held, from take_over() on, through another capsule that is the base of the array.
 */
#include "dlpack.h"

enum {
    DEVICE_CPU = 1,
    TYPE_BFLOAT = 4,
    MAJOR_VERSION = 1,
};

typedef struct {
    char *data;
    struct {
        int32_t type, number;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } type;
    const int64_t *shape;
    const int64_t *strides; /* in numbers; NULL: C-contiguous */
    uint64_t byte_offset;
} dl_tensor;

typedef struct managed {
    dl_tensor tensor;
    void *context;
    void (*deleter)(struct managed *self); /* may be NULL */
} managed;

typedef struct versioned {
    uint32_t major, minor; /* another major version: only the deleter is where it is here */
    void *context;
    void (*deleter)(struct versioned *self); /* may be NULL */
    uint64_t flags; /* whether the memory is read-only, among others */
    dl_tensor tensor;
} versioned;

static const char MANAGED[] = "dltensor", VERSIONED[] = "dltensor_versioned";
static const char USED_MANAGED[] = "used_dltensor", USED_VERSIONED[] = "used_dltensor_versioned";

/* What object.__dlpack__() returns. Producers that are older than versions of DLPack do not know the keyword. */
static PyObject *call_dlpack(const module_state *state, PyObject *object)
{
    PyObject *capsule = NULL, *method = PyObject_GetAttr(object, state->dlpack_name);
    PyObject *none = PyTuple_New(0), *keywords = Py_BuildValue("{s:(ii)}", "max_version", MAJOR_VERSION, 0);
    if (method != NULL && none != NULL && keywords != NULL) {
        capsule = PyObject_Call(method, none, keywords);
        if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            capsule = PyObject_CallNoArgs(method);
        }
    }
    Py_XDECREF(method);
    Py_XDECREF(none);
    Py_XDECREF(keywords);
    return capsule;
}

/* What a capsule holds; NULL if it is not one of DLPack, has been used, or has another layout. */
static const dl_tensor *tensor_in(PyObject *capsule)
{
    if (PyCapsule_IsValid(capsule, MANAGED)) {
        const managed *held = PyCapsule_GetPointer(capsule, MANAGED);
        return &held->tensor;
    }
    if (!PyCapsule_IsValid(capsule, VERSIONED))
        return NULL;
    const versioned *held = PyCapsule_GetPointer(capsule, VERSIONED);
    return held->major == MAJOR_VERSION ? &held->tensor : NULL;
}

static bool is_bfloat16(const dl_tensor *tensor)
{
    return tensor->type.code == TYPE_BFLOAT && tensor->type.bits == 16 && tensor->type.lanes == 1 &&
           tensor->device.type == DEVICE_CPU;
}

/* The destructor of an owner. A deleter may run Python code. */
static void call_deleter(PyObject *owner)
{
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    if (PyCapsule_IsValid(owner, USED_MANAGED)) {
        managed *held = PyCapsule_GetPointer(owner, USED_MANAGED);
        if (held->deleter != NULL)
            held->deleter(held);
    } else {
        versioned *held = PyCapsule_GetPointer(owner, USED_VERSIONED);
        if (held->deleter != NULL)
            held->deleter(held);
    }
    PyErr_Restore(type, error, traceback);
}

/* A new owner of what the capsule holds. The capsule is used from then on. */
static PyObject *take_over(PyObject *capsule)
{
    const bool has_version = PyCapsule_IsValid(capsule, VERSIONED);
    const char *used = has_version ? USED_VERSIONED : USED_MANAGED;
    PyObject *owner =
        PyCapsule_New(PyCapsule_GetPointer(capsule, has_version ? VERSIONED : MANAGED), used, call_deleter);
    if (owner != NULL)
        PyCapsule_SetName(capsule, used);
    return owner;
}

static PyArray_Descr *find_descr(void)
{
    PyArray_Descr *descr = NULL;
    PyObject *module = PyImport_ImportModule("ml_dtypes");
    if (module == NULL) {
        if (PyErr_ExceptionMatches(PyExc_ModuleNotFoundError))
            PyErr_SetString(PyExc_ImportError, "bfloat16 arrays need `pip install \"mha-c[bfloat16]\"`, which installs "
                                               "ml_dtypes");
        return NULL;
    }
    PyObject *type = PyObject_GetAttrString(module, "bfloat16");
    Py_DECREF(module);
    if (type == NULL || !PyArray_DescrConverter(type, &descr))
        descr = NULL;
    else if (!PyTypeNum_ISUSERDEF(descr->type_num)) {
        PyErr_SetString(PyExc_ImportError, "ml_dtypes.bfloat16 is not a dtype of NumPy");
        Py_CLEAR(descr);
    }
    Py_XDECREF(type);
    return descr;
}

/* The shape and the strides as NumPy has them. False if they describe no array. */
static bool read_shape(const dl_tensor *tensor, npy_intp *shape, npy_intp *strides)
{
    if (tensor->ndim < 0 || tensor->ndim > NPY_MAXDIMS || (tensor->ndim > 0 && tensor->shape == NULL))
        return false;
    bool is_empty = false;
    for (int32_t axis = 0; axis < tensor->ndim; axis++) {
        if (tensor->shape[axis] < 0 || __builtin_mul_overflow(tensor->shape[axis], 1, &shape[axis]) ||
            (tensor->strides != NULL && __builtin_mul_overflow(tensor->strides[axis], 2, &strides[axis])))
            return false;
        is_empty |= shape[axis] == 0;
    }
    return is_empty || tensor->data != NULL;
}

/* A read-only array, since the memory may be. Takes over the reference to the owner. */
static PyObject *make_array(const dl_tensor *tensor, PyObject *owner, const char *name)
{
    static char nothing[2]; /* where an empty array is that has no memory */
    npy_intp shape[NPY_MAXDIMS], strides[NPY_MAXDIMS];
    PyArrayObject *array = NULL;
    PyArray_Descr *descr = NULL;
    if (!read_shape(tensor, shape, strides)) {
        PyErr_Format(PyExc_BufferError, "%s has a DLPack capsule that does not describe an array", name);
        goto done;
    }
    descr = find_descr();
    if (descr == NULL)
        goto done;
    array = (PyArrayObject *)PyArray_NewFromDescr(
        &PyArray_Type, (PyArray_Descr *)Py_NewRef((PyObject *)descr), tensor->ndim, shape,
        tensor->strides == NULL ? NULL : strides, tensor->data == NULL ? nothing : tensor->data + tensor->byte_offset,
        0, NULL);
    if (array == NULL)
        goto done;
    PyArray_UpdateFlags(array, NPY_ARRAY_UPDATE_ALL);
    if (PyArray_SetBaseObject(array, Py_NewRef(owner)) < 0)
        Py_CLEAR(array);
done:
    Py_XDECREF((PyObject *)descr);
    Py_DECREF(owner);
    return (PyObject *)array;
}

PyObject *bfloat16_from_dlpack(const module_state *state, PyObject *object, const char *name)
{
    PyObject *type, *error, *traceback, *array = NULL;
    PyErr_Fetch(&type, &error, &traceback);
    PyObject *capsule = call_dlpack(state, object);
    const dl_tensor *tensor = capsule == NULL ? NULL : tensor_in(capsule);
    if (tensor != NULL && is_bfloat16(tensor)) {
        PyObject *owner = take_over(capsule);
        array = owner == NULL ? NULL : make_array(tensor, owner, name);
    } else if (!PyErr_Occurred() ||
               (PyErr_ExceptionMatches(PyExc_Exception) && !PyErr_ExceptionMatches(PyExc_MemoryError))) {
        PyErr_Restore(type, error, traceback);
        type = error = traceback = NULL;
    }
    Py_XDECREF(capsule);
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
    return array;
}
