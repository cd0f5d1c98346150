/* SPDX-License-Identifier: Apache-2.0
 *
 * Statuses into exceptions. The texts users can meet are stock's own; what our reader refuses is
 * never shown as such: the Python side gives the call to stock, whose exception it becomes.
 */
#include "py_err.h"

int stx_py_err_load(struct stx_py_state *state) {
    if (state->safetensors_error != NULL) return 0;
    PyObject *py_module = PyImport_ImportModule("safetensors");
    if (py_module == NULL) return -1;
    state->safetensors_error = PyObject_GetAttrString(py_module, "SafetensorError");
    Py_DECREF(py_module);
    return state->safetensors_error == NULL ? -1 : 0;
}

PyObject *stx_py_raise_refused(const struct stx_py_state *state, const struct stx_err *err) {
    /* Messages may hold a cut multi-byte name; "replace" keeps them text. */
    PyObject *py_text =
        PyUnicode_DecodeUTF8(err->message, (Py_ssize_t)strlen(err->message), "replace");
    if (py_text == NULL) return NULL;
    PyObject *py_arguments = Py_BuildValue("(sNK)", stx_err_name(err->status), py_text,
                                           (unsigned long long)err->position_bytes);
    if (py_arguments == NULL) return NULL;
    PyErr_SetObject(state->refused, py_arguments);
    Py_DECREF(py_arguments);
    return NULL;
}

PyObject *stx_py_raise_closed(const struct stx_py_state *state) {
    PyErr_SetString(state->safetensors_error, "File is closed");
    return NULL;
}

PyObject *stx_py_raise_missing(const struct stx_py_state *state, PyObject *py_name,
                               int left_out_by_filter) {
    return PyErr_Format(state->safetensors_error, "File does not contain tensor %U%s", py_name,
                        left_out_by_filter ? " (left out by tensor_filter)" : "");
}
