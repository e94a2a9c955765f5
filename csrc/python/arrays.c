/* SPDX-License-Identifier: Apache-2.0
 *
 * arrays.c - makes NumPy arrays of Python objects, and answers questions about arrays.
 * Assumes: the GIL is held.
 */
#include "arrays.h"

#include <string.h>

#include "../cpu.h"
#include "dlpack.h"
#include "run.h"

/* Whether the object has the attribute. -1 if looking it up raised anything but AttributeError. */
static int has_attribute(PyObject *object, PyObject *name)
{
    PyObject *attribute = PyObject_GetAttr(object, name);
    if (attribute != NULL) {
        Py_DECREF(attribute);
        return 1;
    }
    if (!PyErr_ExceptionMatches(PyExc_AttributeError))
        return -1;
    PyErr_Clear();
    return 0;
}

/* Whether NumPy can make an array of the object without inspecting elements: 1, 0, or -1 with an exception. */
static int exposes_array(const module_state *state, PyObject *object)
{
    if (PyObject_CheckBuffer(object))
        return 1;
    PyObject *const names[] = {state->array_name, state->array_interface_name, state->array_struct_name};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const int has = has_attribute(object, names[i]);
        if (has != 0)
            return has;
    }
    return 0;
}

static PyArrayObject *raise_not_an_array(PyObject *object, const char *name)
{
    PyErr_Format(PyExc_TypeError, "%s must be an array (NumPy, buffer protocol or DLPack), not %s", name,
                 Py_TYPE(object)->tp_name);
    return NULL;
}

/* Whether NumPy raised what it raises for a type that it does not have. torch's tensors with pending operations raise
 * RuntimeError: their memory does not hold their numbers. */
static bool could_not_read(bool exposes)
{
    return exposes ? PyErr_ExceptionMatches(PyExc_TypeError)
                   : PyErr_ExceptionMatches(PyExc_RuntimeError) || PyErr_ExceptionMatches(PyExc_BufferError);
}

static PyArrayObject *array_from_protocol(const module_state *state, PyObject *object, const char *name)
{
    /* NumPy would make arrays of these, too, but they are numbers, text and classes. */
    if (PyArray_IsScalar(object, Generic) || PyBytes_Check(object) || PyType_Check(object))
        return raise_not_an_array(object, name);

    const int exposes = exposes_array(state, object);
    if (exposes < 0)
        return NULL;
    PyObject *array = NULL;
    if (exposes) {
        array = PyArray_FromAny(object, NULL, 0, 0, 0, NULL);
    } else {
        const int dlpack = has_attribute(object, state->dlpack_name);
        if (dlpack < 0)
            return NULL;
        if (dlpack == 0)
            return raise_not_an_array(object, name);
        array = PyObject_CallOneArg(state->from_dlpack, object);
    }
    if (array == NULL && could_not_read(exposes))
        array = bfloat16_from_dlpack(state, object, name);
    if (array == NULL)
        return NULL;

    /* NumPy makes an array of one object if a protocol did not give an array. */
    if (!PyArray_Check(array) ||
        (PyArray_NDIM((PyArrayObject *)array) == 0 && PyArray_TYPE((PyArrayObject *)array) == NPY_OBJECT)) {
        Py_DECREF(array);
        return raise_not_an_array(object, name);
    }
    return (PyArrayObject *)array;
}

/* Both functions take over the reference to the array, and may return the same array. A masked array of numpy.ma is
 * refused, because its mask would be ignored. */
static PyArrayObject *to_base_class(const module_state *state, PyArrayObject *array, const char *name)
{
    if (PyArray_CheckExact(array))
        return array;
    PyObject *view = NULL;
    const int is_masked = has_attribute((PyObject *)array, state->filled_name);
    if (is_masked > 0)
        PyErr_Format(PyExc_TypeError,
                     "%s is a masked array, whose mask would be ignored: pass %s.filled(0) to put zeros where it "
                     "masks, or %s.data to ignore the mask",
                     name, name, name);
    else if (is_masked == 0)
        view = PyArray_View(array, NULL, &PyArray_Type);
    Py_DECREF(array);
    return (PyArrayObject *)view;
}

static PyArrayObject *to_native_byte_order(PyArrayObject *array)
{
    if (!PyArray_ISBYTESWAPPED(array))
        return array;
    PyObject *native = NULL;
    PyArray_Descr *descr = PyArray_DescrNewByteorder(PyArray_DESCR(array), NPY_NATIVE);
    if (descr != NULL)
        native = PyArray_FromArray(array, descr, 0);
    Py_DECREF(array);
    return (PyArrayObject *)native;
}

PyArrayObject *array_from_object(const module_state *state, PyObject *object, const char *name)
{
    PyArrayObject *array = NULL;
    if (PyArray_Check(object))
        array = (PyArrayObject *)Py_NewRef(object);
    else
        array = array_from_protocol(state, object, name);
    if (array != NULL)
        array = to_base_class(state, array, name);
    if (array != NULL)
        array = to_native_byte_order(array);
    return array;
}

/* Registered types such as bfloat16 have no kind of their own, so the name has to tell. */
static bool is_registered(PyArray_Descr *descr, const char *name)
{
    return PyTypeNum_ISUSERDEF(descr->type_num) && strstr(descr->typeobj->tp_name, name) != NULL;
}

/* The size decides, not the name: where long double is no wider than double, it is a double. */
static bool descr_is(PyArray_Descr *descr, mha_dtype dtype)
{
    return (dtype == MHA_BFLOAT16 ? is_registered(descr, "bfloat16") : PyTypeNum_ISFLOAT(descr->type_num)) &&
           (size_t)PyDataType_ELSIZE(descr) == mha_size_of(dtype);
}

bool array_has_dtype(PyArrayObject *array, mha_dtype dtype)
{
    return descr_is(PyArray_DESCR(array), dtype);
}

static bool find_dtype_of_descr(PyArray_Descr *descr, mha_dtype *dtype)
{
    for (mha_dtype known = MHA_FLOAT32; known <= MHA_FLOAT16; known++)
        if (descr_is(descr, known)) {
            *dtype = known;
            return true;
        }
    return false;
}

bool find_dtype(PyArrayObject *array, mha_dtype *dtype)
{
    return find_dtype_of_descr(PyArray_DESCR(array), dtype);
}

const char *dtype_name(mha_dtype dtype)
{
    static const char *const names[] = {[MHA_FLOAT32] = "float32", [MHA_FLOAT64] = "float64",
                                        [MHA_BFLOAT16] = "bfloat16", [MHA_FLOAT16] = "float16"};
    return names[dtype];
}

int dtype_of_descr(PyArray_Descr *descr, mha_dtype *dtype)
{
    if (PyArray_ISNBO(descr->byteorder) && find_dtype_of_descr(descr, dtype))
        return 0;
    PyErr_Format(PyExc_TypeError, "parameters must be of float32, float64, bfloat16 or float16, not %S",
                 (PyObject *)descr);
    return -1;
}

const char *torch_dtype_name(mha_dtype dtype)
{
    static const char *const names[] = {[MHA_FLOAT32] = "Float", [MHA_FLOAT64] = "Double", [MHA_BFLOAT16] = "BFloat16",
                                        [MHA_FLOAT16] = "Half"};
    return names[dtype];
}

bool array_is_floating(PyArrayObject *array)
{
    return PyTypeNum_ISFLOAT(PyArray_TYPE(array)) || is_registered(PyArray_DESCR(array), "float");
}

typedef struct {
    char kind;
    int item_size;
    const char *in_torch, *in_cpp; /* in_cpp NULL: the same */
} type_names;

/* NULL: torch has no such dtype, or it is bfloat16. */
static const type_names *find_type_names(PyArrayObject *array)
{
    static const type_names known[] = {
        {'b', 1, "Bool", "bool"},
        {'i', 1, "Char", "signed char"},
        {'i', 2, "Short", "short int"},
        {'i', 4, "Int", "int"},
        {'i', 8, "Long", "long int"},
        {'u', 1, "Byte", "unsigned char"},
        {'u', 2, "UInt16", NULL},
        {'u', 4, "UInt32", NULL},
        {'u', 8, "UInt64", NULL},
        {'f', 2, "Half", "c10::Half"},
        {'f', 4, "Float", "float"},
        {'f', 8, "Double", "double"},
        {'c', 8, "ComplexFloat", "c10::complex<float>"},
        {'c', 16, "ComplexDouble", "c10::complex<double>"},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].kind == PyArray_DESCR(array)->kind && known[i].item_size == PyArray_ITEMSIZE(array))
            return &known[i];
    return NULL;
}

const char *torch_type_name(PyArrayObject *array)
{
    const type_names *names = find_type_names(array);
    if (names != NULL)
        return names->in_torch;
    const char *name = PyArray_DESCR(array)->typeobj->tp_name;
    return strstr(name, "bfloat16") != NULL ? "BFloat16" : name;
}

const char *cpp_type_name(PyArrayObject *array)
{
    const type_names *names = find_type_names(array);
    if (names != NULL && names->in_cpp != NULL)
        return names->in_cpp;
    return array_has_dtype(array, MHA_BFLOAT16) ? "c10::BFloat16" : torch_type_name(array);
}

bool array_has_shape(PyArrayObject *array, int ndim, const npy_intp *shape)
{
    return PyArray_NDIM(array) == ndim && PyArray_CompareLists(PyArray_DIMS(array), shape, ndim);
}

int raise_wrong_shape(PyArrayObject *array, const char *name, int ndim, const npy_intp *shape)
{
    PyObject *expected = PyArray_IntTupleFromIntp(ndim, shape);
    PyObject *actual = PyArray_IntTupleFromIntp(PyArray_NDIM(array), PyArray_DIMS(array));
    if (expected != NULL && actual != NULL)
        PyErr_Format(PyExc_ValueError, "%s must have the shape %R, not %R", name, expected, actual);
    Py_XDECREF(expected);
    Py_XDECREF(actual);
    return -1;
}

PyObject *shape_as_list(int ndim, const npy_intp *shape)
{
    PyObject *tuple = PyArray_IntTupleFromIntp(ndim, shape);
    PyObject *list = tuple == NULL ? NULL : PySequence_List(tuple);
    Py_XDECREF(tuple);
    return list;
}

/* Addresses are compared as numbers, because C does not compare pointers to different objects. */
static void find_bounds(PyArrayObject *array, uintptr_t *begin, uintptr_t *end)
{
    *begin = (uintptr_t)PyArray_DATA(array);
    *end = *begin + (size_t)PyArray_ITEMSIZE(array);
    for (int axis = 0; axis < PyArray_NDIM(array); axis++) {
        const npy_intp last = PyArray_DIM(array, axis) - 1, stride = PyArray_STRIDE(array, axis);
        if (last < 0) {
            *end = *begin;
            return;
        }
        *(stride < 0 ? begin : end) += (uintptr_t)last * (uintptr_t)stride;
    }
}

bool is_apart(PyArrayObject *array, PyArrayObject *const *others, size_t count)
{
    uintptr_t begin, end, other_begin, other_end;
    find_bounds(array, &begin, &end);
    for (size_t i = 0; i < count; i++) {
        if (others[i] == NULL)
            continue;
        find_bounds(others[i], &other_begin, &other_end);
        if (begin < other_end && other_begin < end)
            return false;
    }
    return true;
}

int collect_array(const module_state *state, PyObject *object, const char *name, PyArrayObject **array)
{
    *array = array_from_object(state, object, name);
    return *array == NULL ? -1 : 0;
}

int collect_optional(const module_state *state, PyObject *object, const char *name, PyArrayObject **array)
{
    return object == Py_None ? 0 : collect_array(state, object, name, array);
}

int collect_mask(const module_state *state, PyObject *object, const char *name, PyArrayObject **mask)
{
    if (collect_optional(state, object, name, mask) < 0)
        return -1;
    if (*mask == NULL || !array_is_floating(*mask) || array_has_dtype(*mask, MHA_FLOAT32) ||
        array_has_dtype(*mask, MHA_FLOAT64))
        return 0;
    PyArray_Descr *descr = PyArray_DescrFromType(PyArray_TYPE(*mask) == NPY_LONGDOUBLE ? NPY_DOUBLE : NPY_FLOAT);
    Py_SETREF(*mask, (PyArrayObject *)PyArray_FromArray(*mask, descr, NPY_ARRAY_FORCECAST));
    return *mask == NULL ? -1 : 0;
}

mha_mask_kind mask_kind(PyArrayObject *mask)
{
    if (PyArray_ISBOOL(mask))
        return MHA_MASK_HIDE;
    return array_has_dtype(mask, MHA_FLOAT64) ? MHA_MASK_FLOAT64 : MHA_MASK_FLOAT32;
}

PyArrayObject *new_stored_array(int ndim, const npy_intp *shape, int type)
{
    PyArray_Descr *descr = PyArray_DescrFromType(type);
    if (descr == NULL)
        return NULL;
    npy_intp bytes = PyDataType_ELSIZE(descr);
    for (int i = 0; i < ndim; i++) {
        if (shape[i] != 0 && __builtin_mul_overflow(bytes, shape[i], &bytes)) {
            Py_DECREF(descr);
            raise_status(MHA_TOO_LARGE);
            return NULL;
        }
    }
    return (PyArrayObject *)PyArray_NewFromDescr(&PyArray_Type, descr, ndim, shape, NULL, NULL, 0, NULL);
}

PyArrayObject *new_array(int ndim, const npy_intp *shape, mha_dtype dtype)
{
    return new_stored_array(ndim, shape, mha_computed_in(dtype) == MHA_FLOAT32 ? NPY_FLOAT : NPY_DOUBLE);
}

PyArrayObject *as_computed(PyArrayObject *array)
{
    mha_dtype dtype;
    if (array == NULL || !find_dtype(array, &dtype) || !mha_is_half(dtype))
        return (PyArrayObject *)Py_XNewRef((PyObject *)array);
    PyArrayObject *halves = (PyArrayObject *)Py_NewRef((PyObject *)array);
    if (!PyArray_ISCARRAY_RO(array))
        Py_SETREF(halves, (PyArrayObject *)PyArray_NewCopy(array, NPY_CORDER));
    PyArrayObject *wide = halves == NULL ? NULL : new_array(PyArray_NDIM(array), PyArray_DIMS(array), dtype);
    if (wide != NULL)
        mha_cpu_kernels(dtype)->widen(dtype, PyArray_DATA(halves), (size_t)PyArray_SIZE(wide), PyArray_DATA(wide));
    Py_XDECREF(halves);
    return wide;
}

int take_computed(PyArrayObject **const *arrays, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        PyArrayObject *given = *arrays[i], *computed = as_computed(given);
        if (computed == NULL && given != NULL)
            return -1;
        for (size_t j = i; j < count; j++)
            if (*arrays[j] == given)
                Py_XSETREF(*arrays[j], (PyArrayObject *)Py_XNewRef((PyObject *)computed));
        Py_XDECREF(computed);
    }
    return 0;
}

/* A new array of halves from a C-contiguous one of float32. */
static PyArrayObject *narrowed(PyArrayObject *wide, mha_dtype dtype, int type)
{
    PyArrayObject *halves = new_stored_array(PyArray_NDIM(wide), PyArray_DIMS(wide), type);
    if (halves != NULL)
        mha_cpu_kernels(dtype)->narrow(dtype, PyArray_DATA(wide), (size_t)PyArray_SIZE(wide), PyArray_DATA(halves));
    return halves;
}

PyObject *handed_back(PyArrayObject *result, PyArrayObject *out)
{
    if (out == NULL || out == result)
        return Py_NewRef((PyObject *)result);
    return PyArray_CopyInto(out, result) < 0 ? NULL : Py_NewRef((PyObject *)out);
}

PyObject *as_stored(PyArrayObject *result, PyArray_Descr *descr, PyArrayObject *out)
{
    mha_dtype dtype;
    if (!find_dtype_of_descr(descr, &dtype) || !mha_is_half(dtype))
        return handed_back(result, out);
    PyArrayObject *halves = narrowed(result, dtype, descr->type_num);
    PyObject *handed = halves == NULL ? NULL : handed_back(halves, out);
    Py_XDECREF(halves);
    return handed;
}

/* ---- Parameters ---- */

static int check_layout(PyArrayObject *array, const char *name)
{
    if (PyArray_ISCARRAY_RO(array))
        return 0;
    PyErr_Format(PyExc_ValueError, "%s must be C-contiguous, aligned and in native byte order", name);
    return -1;
}

int parameter_from_object(PyObject *object, const char *name, mha_dtype dtype, PyArrayObject **array)
{
    if (!PyArray_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s must be a NumPy array, not %s", name, Py_TYPE(object)->tp_name);
        return -1;
    }
    *array = (PyArrayObject *)object;
    if (!array_has_dtype(*array, dtype)) {
        PyErr_Format(PyExc_TypeError, "%s must be of dtype %s, not %s", name, dtype_name(dtype),
                     PyArray_DESCR(*array)->typeobj->tp_name);
        return -1;
    }
    return check_layout(*array, name);
}

static int weight_from_tuple(PyObject *tuple, const char *name, mha_dtype dtype, weight_arrays *weight)
{
    const bool is_pair = PyTuple_GET_SIZE(tuple) == 2 && dtype != MHA_FLOAT64;
    PyObject *numbers = is_pair ? PyTuple_GET_ITEM(tuple, 0) : Py_None;
    PyObject *scale = is_pair ? PyTuple_GET_ITEM(tuple, 1) : Py_None;
    const bool is_bf16 = is_text(scale, "bfloat16");
    if (is_bf16 || is_text(scale, "float32")) {
        weight->is_bf16 = is_bf16;
        return parameter_from_object(numbers, name, dtype, &weight->numbers);
    }
    if (!PyArray_Check(numbers) || !PyArray_Check(scale) || PyArray_TYPE((PyArrayObject *)numbers) != NPY_INT8 ||
        PyArray_TYPE((PyArrayObject *)scale) != NPY_FLOAT32) {
        PyErr_Format(PyExc_TypeError, "%s must be an array of dtype %s%s", name, dtype_name(dtype),
                     dtype == MHA_FLOAT64 ? "" : ", a tuple of an int8 array and a float32 array of scales, or a tuple "
                                                 "of an array and 'bfloat16' or 'float32'");
        return -1;
    }
    weight->numbers = (PyArrayObject *)numbers;
    weight->scale = (PyArrayObject *)scale;
    if (check_layout(weight->numbers, name) < 0 || check_layout(weight->scale, name) < 0)
        return -1;
    if (PyArray_NDIM(weight->numbers) < 1 || !array_has_shape(weight->scale, 1, PyArray_DIMS(weight->numbers))) {
        PyErr_Format(PyExc_ValueError, "%s must have a scale for each of its rows", name);
        return -1;
    }
    return 0;
}

int weight_from_object(PyObject *object, const char *name, mha_dtype dtype, weight_arrays *weight)
{
    *weight = (weight_arrays){.numbers = NULL};
    if (PyTuple_Check(object))
        return weight_from_tuple(object, name, dtype, weight);
    weight->is_bf16 = dtype == MHA_BFLOAT16;
    return parameter_from_object(object, name, dtype, &weight->numbers);
}

mha_weight weight_of(const weight_arrays *weight)
{
    return (mha_weight){.numbers = PyArray_DATA(weight->numbers),
                        .scale = weight->scale == NULL ? NULL : PyArray_DATA(weight->scale),
                        .is_bf16 = weight->is_bf16};
}

Py_ssize_t weight_nbytes(const weight_arrays *weight)
{
    if (weight->is_bf16)
        return (Py_ssize_t)sizeof(uint16_t) * PyArray_SIZE(weight->numbers);
    return PyArray_NBYTES(weight->numbers) + (weight->scale == NULL ? 0 : PyArray_NBYTES(weight->scale));
}

int out_from_object(const module_state *state, PyObject *object, PyArrayObject **out)
{
    if (object == Py_None)
        return 0;
    if (!PyArray_Check(object)) {
        PyErr_Format(PyExc_TypeError, "out must be a NumPy array, not %s", Py_TYPE(object)->tp_name);
        return -1;
    }
    const int is_masked = PyArray_CheckExact(object) ? 0 : has_attribute(object, state->filled_name);
    if (is_masked > 0)
        PyErr_SetString(PyExc_TypeError, "out is a masked array, whose mask would hide results: pass out.data");
    if (is_masked != 0)
        return -1;
    *out = (PyArrayObject *)object;
    return PyArray_FailUnlessWriteable(*out, "out"); /* which may warn */
}

int check_out(PyArrayObject *out, mha_dtype dtype, int ndim, const npy_intp *shape)
{
    if (!array_has_dtype(out, dtype)) {
        PyErr_Format(PyExc_TypeError, "out must be of dtype %s, not %S", dtype_name(dtype),
                     (PyObject *)PyArray_DESCR(out));
        return -1;
    }
    return array_has_shape(out, ndim, shape) ? 0 : raise_wrong_shape(out, "out", ndim, shape);
}
