/* SPDX-License-Identifier: Apache-2.0
 *
 * All kept tensors of a handle at once: the reads are planned, a cold file that is kept in part is
 * advised exactly so, then every tensor is made. Makes no reads of its own: the mapping's pages
 * come when they are touched, or were asked for here.
 */
#include "py_ahead.h"
#include "py_handle.h"
#include "py_owned.h"
#include "py_tensor.h"
#include "trace.h"

/* Whether no Python code runs while the dict is made: neither stock's nor a torch mode's. */
static bool is_all_native(const struct stx_py_handle *self, int dispatch_depth) {
    bool native = dispatch_depth == 0 && stx_py_torch_function_depth(self->state) == 0;
    for (size_t i = 0; native && i < self->source.header.tensors_count; i++)
        native = !stx_py_handle_keeps(self, i) ||
                 stx_py_tensor_is_native(&self->source.header.tensors[i]);
    PyErr_Clear();
    return native;
}

/* A dict of all kept tensors, in file order. Nothing made here can be garbage yet, but making
 * thousands of objects sets off collections that walk the whole process, torch's own objects
 * included: they wait until the dict is whole, where nobody else can notice. */
static PyObject *build_dict(struct stx_py_handle *self, int dispatch_depth) {
    const struct stx_py_place place = stx_py_handle_place(self);
    PyObject *py_tensors = PyDict_New();
    const int collected = is_all_native(self, dispatch_depth) && PyGC_Disable();
    for (size_t i = 0; py_tensors != NULL && i < self->source.header.tensors_count; i++) {
        if (!stx_py_handle_keeps(self, i)) continue;
        PyObject *py_name = stx_py_names_get(&self->names, i);
        PyObject *py_tensor =
            py_name == NULL ? NULL : stx_py_handle_tensor(self, i, &place, dispatch_depth);
        if (py_tensor == NULL || PyDict_SetItem(py_tensors, py_name, py_tensor) != 0)
            Py_CLEAR(py_tensors);
        Py_XDECREF(py_tensor);
    }
    if (collected) (void)PyGC_Enable();
    return py_tensors;
}

/* The same of a mapped file: the reads are planned first. */
static PyObject *load_mapped(struct stx_py_handle *self, int dispatch_depth) {
    if (stx_py_ahead_all(self) != 0) return NULL;
    const uint64_t start_ns = stx_py_clock_ns(), begin_ns = stx_trace_begin();
    PyObject *py_tensors = build_dict(self, dispatch_depth);
    self->state->counters.wrap_ns += stx_py_clock_ns() - start_ns;
    STX_TRACE(STX_TRACE_TENSORS, begin_ns, self->source.file.label, NULL, self->kept_count,
              py_tensors == NULL);
    return py_tensors;
}

PyObject *stx_py_handle_load(struct stx_py_handle *self) {
    const bool is_owned = self->file != NULL;
    const uint64_t begin_ns = stx_trace_begin();
    const int dispatch_depth = stx_py_torch_dispatch_depth(self->state);
    if (dispatch_depth < 0) return NULL;
    PyObject *py_tensors =
        is_owned ? stx_py_owned_load(self, dispatch_depth) : load_mapped(self, dispatch_depth);
    STX_TRACE(STX_TRACE_LOAD, begin_ns, self->source.file.label, is_owned ? "owned" : "mapped",
              self->kept_count, self->kept_bytes, py_tensors == NULL);
    return py_tensors;
}
