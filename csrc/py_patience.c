/* SPDX-License-Identifier: Apache-2.0
 *
 * Both are Python's to answer, so the lock is taken for as long as it takes to ask.
 */
#include "py_patience.h"

/* Call a method of the handle's progress, if anybody watches; takes `py_arguments`. */
static int call_progress(const struct stx_py_handle *self, const char *method,
                         PyObject *py_arguments) {
    PyObject *py_progress = NULL, *py_method = NULL, *py_done = NULL;
    if (py_arguments != NULL && self->py_origin == NULL) /* a cycle is being collected */
        py_done = Py_NewRef(Py_None);
    else if (py_arguments != NULL)
        py_progress = PyObject_GetAttrString(self->py_origin, "progress");
    if (py_progress == Py_None)
        py_done = Py_NewRef(Py_None);
    else if (py_progress != NULL)
        py_method = PyObject_GetAttrString(py_progress, method);
    if (py_method != NULL) py_done = PyObject_CallObject(py_method, py_arguments);
    Py_XDECREF(py_method);
    Py_XDECREF(py_progress);
    Py_XDECREF(py_arguments);
    Py_XDECREF(py_done);
    return py_done == NULL ? -1 : 0;
}

int stx_py_progress_report(const struct stx_py_handle *self, uint64_t done_bytes) {
    return call_progress(self, "report",
                         Py_BuildValue("(KK)", (unsigned long long)done_bytes,
                                       (unsigned long long)self->kept_bytes));
}

int stx_py_progress_stop(const struct stx_py_handle *self) {
    return call_progress(self, "stop", PyTuple_New(0));
}

void stx_py_progress_drop(const struct stx_py_handle *self) {
    PyObject *py_type, *py_value, *py_traceback;
    PyErr_Fetch(&py_type, &py_value, &py_traceback);
    if (stx_py_progress_stop(self) != 0) PyErr_WriteUnraisable(self->py_origin);
    PyErr_Restore(py_type, py_value, py_traceback);
}

bool stx_py_patience_ask(void *context) {
    struct stx_py_patience *patience = context;
    PyEval_RestoreThread(patience->thread);
    patience->raised = PyErr_CheckSignals() != 0;
    if (!patience->raised && patience->reporting != NULL) {
        const uint64_t kept_bytes = patience->reporting->kept_bytes;
        const uint64_t read_bytes = patience->result->bytes_read; /* with what lies between */
        if (read_bytes < kept_bytes)
            patience->raised = stx_py_progress_report(patience->reporting, read_bytes) != 0;
    }
    patience->thread = PyEval_SaveThread();
    return !patience->raised;
}
