/* SPDX-License-Identifier: Apache-2.0
 *
 * The handle type: stock's methods over one native source, and a few of our own.
 *
 * DESIGN. An open handle (py_open.c) is a table and a mapping: making a tensor does not touch the
 * file. Every method runs with the GIL, but allocating Python objects may run other threads' code,
 * and one of them may close the handle: `busy` counts methods that are inside, and what close gives
 * up is freed when the last one leaves.
 *
 * What a handle cannot serve (a 6-bit dtype, an active dispatch mode, a method that only a newer
 * stock has) goes through its origin to a stock handle of the same file.
 */
#include "py_handle.h"

#include "py_ahead.h"
#include "py_args.h"
#include "py_err.h"
#include "py_owned.h"
#include "py_slice.h"
#include "py_stream.h"

/* --- life --- */

static void release_source(struct stx_py_handle *self) {
    stx_py_names_free(&self->names);
    stx_source_close(&self->source);
    stx_py_file_release(self->file);
    PyMem_Free(self->keep);
    PyMem_Free(self->sorted);
    self->file = NULL;
    self->keep = NULL;
    self->sorted = NULL;
}

/* Begin a method. False with "File is closed". */
static bool enter(struct stx_py_handle *self) {
    if (self->closed) {
        (void)stx_py_raise_closed(self->state);
        return false;
    }
    self->busy++;
    return true;
}

void stx_py_handle_leave(struct stx_py_handle *self) {
    if (--self->busy == 0 && self->closed) release_source(self);
}

/* End a method; passes its result on. */
static PyObject *leave(struct stx_py_handle *self, PyObject *py_result) {
    stx_py_handle_leave(self);
    return py_result;
}

static int handle_traverse(PyObject *py_self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(py_self));
    Py_VISIT(((struct stx_py_handle *)py_self)->py_origin);
    return 0;
}

static int handle_clear(PyObject *py_self) {
    Py_CLEAR(((struct stx_py_handle *)py_self)->py_origin);
    return 0;
}

static void handle_dealloc(PyObject *py_self) {
    struct stx_py_handle *self = (struct stx_py_handle *)py_self;
    PyTypeObject *type = Py_TYPE(py_self);
    PyObject_GC_UnTrack(py_self);
    release_source(self);
    Py_XDECREF(self->py_origin);
    PyObject_GC_Del(py_self);
    Py_DECREF(type);
}

/* --- names --- */

Py_ssize_t stx_py_handle_find(const struct stx_py_handle *self, PyObject *py_name) {
    Py_ssize_t name_bytes = 0;
    const char *name = PyUnicode_AsUTF8AndSize(py_name, &name_bytes);
    if (name == NULL) return -1;
    const struct stx_header *header = &self->source.header;
    const struct stx_tensor *tensor = stx_header_find(header, name, (size_t)name_bytes);
    if (tensor != NULL && stx_py_handle_keeps(self, (size_t)(tensor - header->tensors)))
        return tensor - header->tensors;
    (void)stx_py_raise_missing(self->state, py_name, tensor != NULL);
    return -1;
}

/* Names of the kept tensors, or of `all`; `order` gives indexes, NULL means offset order. */
static PyObject *list_names(struct stx_py_handle *self, const uint32_t *order, bool all) {
    const size_t count = self->source.header.tensors_count;
    PyObject *py_list = PyList_New((Py_ssize_t)(all ? count : self->kept_count));
    Py_ssize_t filled = 0;
    for (size_t i = 0; py_list != NULL && i < count; i++) {
        const size_t index = order == NULL ? i : order[i];
        if (!all && !stx_py_handle_keeps(self, index)) continue;
        PyObject *py_name = stx_py_names_get(&self->names, index);
        if (py_name == NULL) {
            Py_CLEAR(py_list);
            break;
        }
        (void)PyList_SetItem(py_list, filled++, Py_NewRef(py_name));
    }
    return py_list;
}

static PyObject *sort_and_list(struct stx_py_handle *self) {
    struct stx_err err;
    if (self->sorted == NULL) {
        const size_t count = self->source.header.tensors_count;
        uint32_t *order = PyMem_Calloc(count + 1, sizeof *order);
        if (order == NULL || stx_header_sort_names(&self->source.header, order, &err) != STX_OK) {
            PyMem_Free(order);
            return PyErr_NoMemory();
        }
        self->sorted = order;
    }
    return list_names(self, self->sorted, false);
}

static PyObject *handle_keys(PyObject *py_self, PyObject *py_unused) {
    struct stx_py_handle *self = (struct stx_py_handle *)py_self;
    (void)py_unused;
    return enter(self) ? leave(self, sort_and_list(self)) : NULL;
}

static PyObject *handle_offset_keys(PyObject *py_self, PyObject *py_unused) {
    struct stx_py_handle *self = (struct stx_py_handle *)py_self;
    (void)py_unused;
    return enter(self) ? leave(self, list_names(self, NULL, false)) : NULL;
}

static PyObject *handle_all_names(PyObject *py_self, PyObject *py_unused) {
    struct stx_py_handle *self = (struct stx_py_handle *)py_self;
    (void)py_unused;
    return enter(self) ? leave(self, list_names(self, NULL, true)) : NULL;
}

static PyObject *handle_metadata(PyObject *py_self, PyObject *py_unused) {
    struct stx_py_handle *self = (struct stx_py_handle *)py_self;
    (void)py_unused;
    return enter(self) ? leave(self, stx_py_names_metadata(&self->source.header)) : NULL;
}

/* --- tensors --- */

struct stx_py_place stx_py_handle_place(const struct stx_py_handle *self) {
    const bool ahead = self->ahead == STX_AHEAD_UNDECIDED || self->ahead == STX_AHEAD_COLD;
    return (struct stx_py_place){.mapping = self->source.mapping,
                                 .data_begin_bytes = self->source.header.data_begin_bytes,
                                 .ahead = ahead};
}

PyObject *stx_py_handle_tensor(struct stx_py_handle *self, size_t index,
                               const struct stx_py_place *place, int dispatch_depth) {
    const struct stx_tensor *tensor = &self->source.header.tensors[index];
    if (dispatch_depth == 0 && self->file == NULL && stx_py_tensor_is_native(tensor))
        return stx_py_tensor_make(self->state, place, tensor);
    PyObject *py_name = stx_py_names_get(&self->names, index);
    if (py_name == NULL) return NULL;
    return PyObject_CallMethod(self->py_origin, "stock_tensor", "O", py_name);
}

/* The methods that take a name: what each does with the tensor it found. */
typedef PyObject *(*on_tensor)(struct stx_py_handle *self, size_t index);

static PyObject *call_with_name(PyObject *py_self, const char *function, on_tensor action,
                                PyObject *const *py_arguments, Py_ssize_t count,
                                PyObject *py_keywords) {
    struct stx_py_handle *self = (struct stx_py_handle *)py_self;
    PyObject *py_name = stx_py_args_name(function, py_arguments, count, py_keywords);
    if (py_name == NULL) return NULL;
    if (!PyUnicode_Check(py_name) || PyUnicode_AsUTF8AndSize(py_name, NULL) == NULL) {
        PyErr_Clear(); /* stock's versions word this differently */
        return PyObject_CallMethod(self->py_origin, "refuse_name", "(O)", py_name);
    }
    if (!enter(self)) return NULL;
    const Py_ssize_t index = stx_py_handle_find(self, py_name);
    return leave(self, index < 0 ? NULL : action(self, (size_t)index));
}

static PyObject *give_tensor(struct stx_py_handle *self, size_t index) {
    const struct stx_py_place place = stx_py_handle_place(self);
    const int dispatch_depth = stx_py_torch_dispatch_depth(self->state);
    if (dispatch_depth < 0) return NULL;
    if (self->file != NULL && dispatch_depth == 0 &&
        stx_py_owned_is_native(&self->source.header.tensors[index]))
        return stx_py_owned_tensor(self, index);
    if (dispatch_depth == 0 && self->file == NULL) stx_py_ahead_tensor(self, index);
    return stx_py_handle_tensor(self, index, &place, dispatch_depth);
}

static PyObject *give_slice(struct stx_py_handle *self, size_t index) {
    if (self->file == NULL) stx_py_ahead_slice(self);
    const struct stx_py_place place = stx_py_handle_place(self);
    PyObject *py_name = stx_py_names_get(&self->names, index);
    if (py_name == NULL) return NULL;
    return stx_py_slice_new(self->state, &place, self->file, &self->source.header.tensors[index],
                            index, py_name, self->py_origin);
}

static PyObject *give_dtype(struct stx_py_handle *self, size_t index) {
    return PyUnicode_FromString(stx_dtype_info(self->source.header.tensors[index].dtype)->name);
}

static PyObject *give_shape(struct stx_py_handle *self, size_t index) {
    return stx_py_tensor_shape(&self->source.header.tensors[index]);
}

static PyObject *give_filename(struct stx_py_handle *self, size_t index) {
    (void)index; /* one file, whatever the tensor */
    return PyObject_CallMethod(self->py_origin, "filename", NULL);
}

static PyObject *give_nbytes(struct stx_py_handle *self, size_t index) {
    const struct stx_tensor *tensor = &self->source.header.tensors[index];
    return PyLong_FromUnsignedLongLong(tensor->end - tensor->begin);
}

#define METHOD_WITH_NAME(method, action)                                                  \
    static PyObject *handle_##method(PyObject *py_self, PyObject *const *py_arguments,    \
                                     Py_ssize_t count, PyObject *py_keywords) {           \
        return call_with_name(py_self, "safe_open." #method, action, py_arguments, count, \
                              py_keywords);                                               \
    }
METHOD_WITH_NAME(get_tensor, give_tensor)
METHOD_WITH_NAME(get_slice, give_slice)
METHOD_WITH_NAME(get_dtype, give_dtype)
METHOD_WITH_NAME(get_shape, give_shape)
METHOD_WITH_NAME(nbytes, give_nbytes)
METHOD_WITH_NAME(filename_of, give_filename)

static PyObject *handle_get_tensors(PyObject *py_self, PyObject *py_unused) {
    struct stx_py_handle *self = (struct stx_py_handle *)py_self;
    (void)py_unused;
    return enter(self) ? leave(self, stx_py_handle_load(self)) : NULL;
}

static PyObject *handle_tensors(PyObject *py_self, PyObject *py_arguments, PyObject *py_keywords) {
    static char *parameters[] = {"dtype", NULL};
    struct stx_py_handle *self = (struct stx_py_handle *)py_self;
    PyObject *py_dtype = Py_None;
    if (!PyArg_ParseTupleAndKeywords(py_arguments, py_keywords, "|O", parameters, &py_dtype) ||
        !enter(self))
        return NULL;
    PyObject *py_stream = leave(self, stx_py_stream_new(self));
    if (py_stream == NULL || py_dtype == Py_None) return py_stream;
    return PyObject_CallMethod(self->py_origin, "converted", "NO", py_stream, py_dtype);
}

/* --- the rest --- */

static PyObject *handle_total_tensor_size(PyObject *py_self, void *unused) {
    struct stx_py_handle *self = (struct stx_py_handle *)py_self;
    (void)unused;
    return PyLong_FromUnsignedLongLong(self->kept_bytes);
}

/* Stock's class, so that isinstance() holds also for whoever has the original. */
static PyObject *handle_class(PyObject *py_self, void *unused) {
    struct stx_py_handle *self = (struct stx_py_handle *)py_self;
    (void)unused;
    if (self->py_origin == NULL) return Py_NewRef((PyObject *)Py_TYPE(py_self));
    return PyObject_GetAttrString(self->py_origin, "stock_class");
}

static int handle_set_class(PyObject *py_self, PyObject *py_value, void *unused) {
    (void)py_self, (void)py_value, (void)unused;
    PyErr_SetString(PyExc_TypeError,
                    "__class__ assignment only supported for mutable types or ModuleType "
                    "subclasses");
    return -1;
}

static PyObject *handle_skipped(PyObject *py_self, void *unused) {
    struct stx_py_handle *self = (struct stx_py_handle *)py_self;
    (void)unused;
    return PyLong_FromSize_t(self->skipped_count);
}

static PyObject *handle_enter(PyObject *py_self, PyObject *py_unused) {
    (void)py_unused;
    return Py_NewRef(py_self);
}

static PyObject *handle_exit(PyObject *py_self, PyObject *const *py_arguments, Py_ssize_t count,
                             PyObject *py_keywords) {
    static const char *const parameters[] = {"_exc_type", "_exc_value", "_traceback"};
    struct stx_py_handle *self = (struct stx_py_handle *)py_self;
    PyObject *py_bound[3];
    if (stx_py_args_bind("safe_open.__exit__", parameters, 3, py_arguments, count, py_keywords,
                         py_bound) != 0)
        return NULL;
    self->closed = true;
    if (self->busy == 0) release_source(self);
    return Py_NewRef(Py_None);
}

/* Python's own refusal, in the words it has for stock's class. */
static PyObject *handle_reduce_ex(PyObject *py_self, PyObject *py_protocol) {
    const long protocol = PyLong_AsLong(py_protocol);
    (void)py_self;
    if (protocol == -1 && PyErr_Occurred()) return NULL;
    return PyErr_Format(PyExc_TypeError, "cannot pickle '%s' object",
                        protocol < 2 ? "safe_open" : "builtins.safe_open");
}

static PyObject *handle_reduce(PyObject *py_self, PyObject *py_unused) {
    (void)py_self, (void)py_unused;
    return PyErr_Format(PyExc_TypeError, "cannot pickle 'safe_open' object");
}

/* A public attribute that only stock has (a newer one's methods) comes from stock. */
static PyObject *handle_getattro(PyObject *py_self, PyObject *py_attribute) {
    struct stx_py_handle *self = (struct stx_py_handle *)py_self;
    PyObject *py_type, *py_value, *py_traceback;
    PyObject *py_found = PyObject_GenericGetAttr(py_self, py_attribute);
    if (py_found != NULL || !PyErr_ExceptionMatches(PyExc_AttributeError)) return py_found;
    if (self->py_origin == NULL || PyUnicode_GetLength(py_attribute) == 0 ||
        PyUnicode_ReadChar(py_attribute, 0) == '_')
        return NULL;
    PyErr_Fetch(&py_type, &py_value, &py_traceback);
    py_found = PyObject_CallMethod(self->py_origin, "stock_attribute", "OO", py_self, py_attribute);
    if (py_found == Py_NotImplemented) {
        Py_DECREF(py_found);
        PyErr_Restore(py_type, py_value, py_traceback);
        return NULL;
    }
    Py_XDECREF(py_type);
    Py_XDECREF(py_value);
    Py_XDECREF(py_traceback);
    return py_found;
}

#define WITH_NAME(function) ((PyCFunction)(void (*)(void))(function)), METH_FASTCALL | METH_KEYWORDS

static PyMethodDef handle_methods[] = {
    {"keys", handle_keys, METH_NOARGS,
     PyDoc_STR("keys($self)\n--\n\nNames of the tensors, sorted: a list of str.")},
    {"offset_keys", handle_offset_keys, METH_NOARGS,
     PyDoc_STR("offset_keys($self)\n--\n\nNames of the tensors in file order.")},
    {"metadata", handle_metadata, METH_NOARGS,
     PyDoc_STR("metadata($self)\n--\n\nThe header's __metadata__: a new dict, or None.")},
    {"get_tensor", WITH_NAME(handle_get_tensor),
     PyDoc_STR("get_tensor($self, name)\n--\n\nThe tensor called name; it owns its storage.\n"
               "SafetensorError if there is none.")},
    {"get_tensors", handle_get_tensors, METH_NOARGS,
     PyDoc_STR("get_tensors($self)\n--\n\nAll tensors: a dict in file order.")},
    {"tensors", (PyCFunction)(void (*)(void))handle_tensors, METH_VARARGS | METH_KEYWORDS,
     PyDoc_STR(
         "tensors($self, dtype=None)\n--\n\nIterate over (name, tensor) in file order; each "
         "tensor is in memory of its own,\nfloating-point ones as dtype. Reads ahead within a "
         "window of memory.")},
    {"get_slice", WITH_NAME(handle_get_slice),
     PyDoc_STR("get_slice($self, name)\n--\n\nA lazy slice of the tensor called name; index it.\n"
               "SafetensorError if there is none.")},
    {"get_dtype", WITH_NAME(handle_get_dtype),
     PyDoc_STR("get_dtype($self, name)\n--\n\nIts dtype as the header spells it, such as "
               "\"BF16\".")},
    {"get_shape", WITH_NAME(handle_get_shape),
     PyDoc_STR("get_shape($self, name)\n--\n\nIts shape: a list of int.")},
    {"nbytes", WITH_NAME(handle_nbytes),
     PyDoc_STR("nbytes($self, name)\n--\n\nIts size in the file, in bytes.")},
    {"filename_of", WITH_NAME(handle_filename_of),
     PyDoc_STR(
         "filename_of($self, name)\n--\n\nThe path of the file it lies in, as it was given.")},
    {"_all_names", handle_all_names, METH_NOARGS,
     PyDoc_STR("Names in file order, also those a filter left out.")},
    {"__enter__", handle_enter, METH_NOARGS, PyDoc_STR("__enter__($self)\n--\n\n")},
    {"__exit__", WITH_NAME(handle_exit),
     PyDoc_STR("__exit__($self, _exc_type, _exc_value, _traceback)\n--\n\n")},
    {"__reduce__", handle_reduce, METH_NOARGS, NULL},
    {"__reduce_ex__", handle_reduce_ex, METH_O, NULL},
    {NULL, NULL, 0, NULL}};

static PyGetSetDef handle_getset[] = {
    {"total_tensor_size", handle_total_tensor_size, NULL,
     PyDoc_STR("Bytes of all tensors that are kept."), NULL},
    {"__class__", handle_class, handle_set_class, NULL, NULL},
    {"_skipped_count", handle_skipped, NULL, PyDoc_STR("Tensors that a filter left out."), NULL},
    {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot handle_slots[] = {
    {Py_tp_doc, (void *)(uintptr_t) "A safetensors file, opened natively by stx_patch."},
    {Py_tp_dealloc, handle_dealloc},
    {Py_tp_traverse, handle_traverse},
    {Py_tp_clear, handle_clear},
    {Py_tp_getattro, handle_getattro},
    {Py_tp_methods, handle_methods},
    {Py_tp_getset, handle_getset},
    {0, NULL}};

/* The name is stock's, because Python's own error texts show it. */
PyType_Spec stx_py_handle_spec = {.name = "builtins.safe_open",
                                  .basicsize = sizeof(struct stx_py_handle),
                                  .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC |
                                           Py_TPFLAGS_DISALLOW_INSTANTIATION |
                                           Py_TPFLAGS_IMMUTABLETYPE,
                                  .slots = handle_slots};
