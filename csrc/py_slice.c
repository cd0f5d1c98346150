/* SPDX-License-Identifier: Apache-2.0
 *
 * The slice type.
 *
 * DESIGN. Indexing makes the whole tensor over the mapping (no byte is read by that) and lets torch
 * index it, so that every expression torch accepts works, with torch's errors, and the result is a
 * view as stock's is. Two cases take another way: under a default device or another function mode
 * the tensor passes torch.asarray first, as stock's does; what stx_py_tensor_is_native excludes,
 * 4-bit tensors and dispatch modes go to a stock slice of the same file.
 */
#include "py_slice.h"

#include <string.h>

#include "py_ahead.h"
#include "py_owned.h"

/* After this many a slice takes its file for warm and asks no more. */
#define WARM_ENOUGH 3

struct slice {
    PyObject_HEAD struct stx_py_state *state; /* borrowed: the type keeps the module */
    struct stx_py_place place;                /* this slice is a user of its mapping */
    unsigned warm_count;                      /* indexes in a row that found the page cache warm */
    struct stx_py_file *file;                 /* or of this; then nothing is mapped */
    struct stx_tensor tensor;                 /* its shape is owned, its name is not used */
    size_t index;                             /* in the file's order */
    PyObject *py_name;
    PyObject *py_origin;
};

PyObject *stx_py_slice_new(struct stx_py_state *state, const struct stx_py_place *place,
                           struct stx_py_file *file, const struct stx_tensor *tensor, size_t index,
                           PyObject *py_name, PyObject *py_origin) {
    const size_t shape_bytes = tensor->rank * sizeof *tensor->shape;
    uint64_t *shape = PyMem_Malloc(shape_bytes + 1);
    if (shape == NULL) return PyErr_NoMemory();
    if (shape_bytes != 0) memcpy(shape, tensor->shape, shape_bytes);
    struct slice *self = PyObject_GC_New(struct slice, state->slice_type);
    if (self == NULL) {
        PyMem_Free(shape);
        return NULL;
    }
    if (place->mapping != NULL) stx_mapping_retain(place->mapping);
    self->file = stx_py_file_retain(file);
    self->state = state;
    self->place = *place;
    self->tensor = *tensor;
    self->tensor.name = NULL;
    self->tensor.shape = shape;
    self->index = index;
    self->warm_count = 0;
    self->py_name = Py_NewRef(py_name);
    self->py_origin = Py_NewRef(py_origin);
    PyObject_GC_Track((PyObject *)self);
    return (PyObject *)self;
}

static int slice_traverse(PyObject *py_self, visitproc visit, void *arg) {
    struct slice *self = (struct slice *)py_self;
    Py_VISIT(Py_TYPE(py_self));
    Py_VISIT(self->py_origin);
    return 0;
}

static int slice_clear(PyObject *py_self) {
    (void)py_self; /* a cycle through the origin is broken at the handle */
    return 0;
}

static void slice_dealloc(PyObject *py_self) {
    struct slice *self = (struct slice *)py_self;
    PyTypeObject *type = Py_TYPE(py_self);
    PyObject_GC_UnTrack(py_self);
    PyMem_Free((void *)(uintptr_t)self->tensor.shape);
    stx_mapping_release(self->place.mapping);
    stx_py_file_release(self->file);
    Py_XDECREF(self->py_name);
    Py_XDECREF(self->py_origin);
    PyObject_GC_Del(py_self);
    Py_DECREF(type);
}

static PyObject *slice_get_shape(PyObject *py_self, PyObject *py_unused) {
    (void)py_unused;
    return stx_py_tensor_shape(&((struct slice *)py_self)->tensor);
}

static PyObject *slice_get_dtype(PyObject *py_self, PyObject *py_unused) {
    (void)py_unused;
    return PyUnicode_FromString(stx_dtype_info(((struct slice *)py_self)->tensor.dtype)->name);
}

/* The element that is furthest from the first of `py_view`; -1 if it has none. */
static long long find_last_element(PyObject *py_view) {
    long long last = 0;
    PyObject *py_shape = PyObject_GetAttrString(py_view, "shape");
    PyObject *py_strides = PyObject_CallMethod(py_view, "stride", NULL);
    const Py_ssize_t rank = py_shape == NULL || py_strides == NULL ? -1 : PyTuple_Size(py_shape);
    if (rank < 0) last = -1;
    for (Py_ssize_t i = 0; i < rank && last >= 0; i++) {
        const long long extent = PyLong_AsLongLong(PyTuple_GetItem(py_shape, i));
        const long long stride = PyLong_AsLongLong(PyTuple_GetItem(py_strides, i));
        last = extent <= 0 ? -1 : last + (extent - 1) * stride;
    }
    Py_XDECREF(py_strides);
    Py_XDECREF(py_shape);
    return last;
}

/* Of a file that is not known to be warm: have exactly what a view shows read. A result with memory
 * of its own was copied already. What cannot be found out is left to the page faults. */
static void tell_of_view(struct slice *self, PyObject *py_view) {
    const uint64_t item_bytes = stx_dtype_info(self->tensor.dtype)->bits / 8;
    const uint64_t begin_bytes = self->place.data_begin_bytes + self->tensor.begin;
    const uint64_t size_bytes = self->tensor.end - self->tensor.begin;
    const uint64_t memory =
        (uint64_t)(uintptr_t)stx_mapping_bytes(self->place.mapping) + begin_bytes;
    const long long last = find_last_element(py_view);
    PyObject *py_address = last < 0 ? NULL : PyObject_CallMethod(py_view, "data_ptr", NULL);
    const uint64_t address = py_address == NULL ? 0 : PyLong_AsUnsignedLongLong(py_address);
    const uint64_t view_bytes = ((uint64_t)last + 1) * item_bytes;
    if (address >= memory && address - memory < size_bytes &&
        view_bytes <= size_bytes - (address - memory))
        self->warm_count =
            stx_py_ahead_range(&self->place, self->index, begin_bytes + (address - memory),
                               begin_bytes + (address - memory) + view_bytes)
                ? self->warm_count + 1
                : 0;
    if (self->warm_count == WARM_ENOUGH) self->place.ahead = false;
    Py_XDECREF(py_address);
    PyErr_Clear();
}

/* What stock's slice hands to torch's indexing: the tensor, moved by an active function mode. */
static PyObject *make_indexed(const struct slice *self, int function_depth) {
    PyObject *py_tensor = stx_py_tensor_make(self->state, &self->place, &self->tensor);
    if (py_tensor == NULL || function_depth == 0) return py_tensor;
    PyObject *py_moved = PyObject_CallMethod(self->state->torch.module, "asarray", "O", py_tensor);
    Py_DECREF(py_tensor);
    return py_moved;
}

/* Of a file that is read: Python finds out which rows an index needs; what it does not know is
 * stock's. */
static PyObject *index_owned(PyObject *py_self, PyObject *py_index, int function_depth) {
    const struct slice *self = (const struct slice *)py_self;
    if (function_depth == 0 && self->tensor.rank != 0) {
        PyObject *py_found =
            PyObject_CallMethod(self->py_origin, "owned_slice", "OO", py_self, py_index);
        if (py_found != Py_NotImplemented) return py_found;
        Py_DECREF(py_found);
    }
    return PyObject_CallMethod(self->py_origin, "stock_slice", "OO", self->py_name, py_index);
}

static PyObject *slice_rows(PyObject *py_self, PyObject *py_arguments) {
    const struct slice *self = (const struct slice *)py_self;
    unsigned long long first, count;
    if (!PyArg_ParseTuple(py_arguments, "KK:_rows", &first, &count)) return NULL;
    const uint64_t rows = self->tensor.rank == 0 ? 0 : self->tensor.shape[0];
    if (self->file == NULL || first > rows || count > rows - first) {
        PyErr_SetString(PyExc_ValueError, "no such rows");
        return NULL;
    }
    return stx_py_owned_rows(self->state, &self->file->file, self->place.data_begin_bytes,
                             &self->tensor, first, count);
}

static PyObject *slice_index(PyObject *py_self, PyObject *py_index) {
    struct slice *self = (struct slice *)py_self;
    const int dispatch_depth = stx_py_torch_dispatch_depth(self->state);
    const int function_depth = dispatch_depth < 0 ? -1 : stx_py_torch_function_depth(self->state);
    if (function_depth < 0) return NULL;
    if (dispatch_depth != 0 || self->tensor.dtype == STX_DTYPE_F4 ||
        !stx_py_tensor_is_native(&self->tensor))
        return PyObject_CallMethod(self->py_origin, "stock_slice", "OO", self->py_name, py_index);
    if (self->file != NULL) return index_owned(py_self, py_index, function_depth);
    PyObject *py_tensor = make_indexed(self, function_depth);
    if (py_tensor == NULL) return NULL;
    PyObject *py_result = PyObject_GetItem(py_tensor, py_index);
    Py_DECREF(py_tensor);
    if (py_result != NULL && self->place.ahead && function_depth == 0)
        tell_of_view(self, py_result);
    return py_result;
}

/* For iter() and list(), which stock's slices allow. */
static PyObject *slice_item(PyObject *py_self, Py_ssize_t index) {
    PyObject *py_index = PyLong_FromSsize_t(index);
    if (py_index == NULL) return NULL;
    PyObject *py_result = slice_index(py_self, py_index);
    Py_DECREF(py_index);
    return py_result;
}

static PyMethodDef slice_methods[] = {
    {"get_shape", slice_get_shape, METH_NOARGS,
     PyDoc_STR("get_shape($self)\n--\n\nThe tensor's shape, as the header gives it: a list of "
               "int.")},
    {"get_dtype", slice_get_dtype, METH_NOARGS,
     PyDoc_STR("get_dtype($self)\n--\n\nThe dtype as the header spells it, such as \"BF16\".")},
    {"_rows", slice_rows, METH_VARARGS, PyDoc_STR("_rows($self, first, count)\n--\n\n")},
    {NULL, NULL, 0, NULL}};

static PyObject *slice_origin(PyObject *py_self, void *unused) {
    (void)unused;
    return Py_NewRef(((struct slice *)py_self)->py_origin);
}

static PyObject *slice_name(PyObject *py_self, void *unused) {
    (void)unused;
    return Py_NewRef(((struct slice *)py_self)->py_name);
}

static PyGetSetDef slice_getset[] = {
    {"_origin", slice_origin, NULL, PyDoc_STR("How it reaches its file otherwise."), NULL},
    {"_name", slice_name, NULL, PyDoc_STR("The name of its tensor."), NULL},
    {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot slice_slots[] = {
    {Py_tp_doc, (void *)(uintptr_t) "A lazy tensor of a safetensors file: index it to get data."},
    {Py_tp_dealloc, slice_dealloc},
    {Py_tp_traverse, slice_traverse},
    {Py_tp_clear, slice_clear},
    {Py_tp_methods, slice_methods},
    {Py_tp_getset, slice_getset},
    {Py_mp_subscript, slice_index},
    {Py_sq_item, slice_item},
    {0, NULL}};

/* The name is stock's, because Python's own error texts show it. */
PyType_Spec stx_py_slice_spec = {.name = "builtins.PySafeSlice",
                                 .basicsize = sizeof(struct slice),
                                 .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC |
                                          Py_TPFLAGS_DISALLOW_INSTANTIATION |
                                          Py_TPFLAGS_IMMUTABLETYPE,
                                 .slots = slice_slots};
