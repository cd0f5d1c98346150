/* SPDX-License-Identifier: Apache-2.0
 *
 * No Python code runs between looking at the handles and comparing, so none of them can close.
 */
#include "py_overlap.h"

#include "overlap.h"
#include "py_handle.h"

PyObject *stx_py_names_overlap(PyObject *py_module, PyObject *py_handles) {
    const struct stx_py_state *state = PyModule_GetState(py_module);
    struct stx_err err;
    bool found = false;
    if (!PyList_Check(py_handles)) return PyErr_Format(PyExc_TypeError, "a list is needed");
    const Py_ssize_t count = PyList_Size(py_handles);
    struct stx_overlap_part *parts = PyMem_Calloc((size_t)count + 1, sizeof *parts);
    if (parts == NULL) return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count && !found; i++) {
        PyObject *py_handle = PyList_GetItem(py_handles, i);
        const struct stx_py_handle *handle = (const struct stx_py_handle *)py_handle;
        found = !Py_IS_TYPE(py_handle, state->handle_type) || handle->closed;
        if (found) break;
        parts[i].header = &handle->source.header;
        parts[i].keep = handle->keep;
    }
    const enum stx_status status =
        found ? STX_OK : stx_overlap_find(&found, parts, (size_t)count, &err);
    PyMem_Free(parts);
    return status == STX_OK ? PyBool_FromLong(found) : PyErr_NoMemory();
}
