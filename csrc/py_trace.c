/* SPDX-License-Identifier: Apache-2.0
 *
 * Records as tuples, and their numbers under the names that trace.c has for them: a dict that goes
 * into the file as it is.
 */
#include "py_trace.h"

#include <string.h>

#include "trace.h"

PyObject *stx_py_trace_start(PyObject *py_module, PyObject *py_unused) {
    (void)py_module, (void)py_unused;
    return stx_trace_start(STX_TRACE_RECORDS) ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

PyObject *stx_py_trace_stop(PyObject *py_module, PyObject *py_unused) {
    (void)py_module, (void)py_unused;
    stx_trace_stop();
    return Py_NewRef(Py_None);
}

PyObject *stx_py_trace_count(PyObject *py_module, PyObject *py_unused) {
    (void)py_module, (void)py_unused;
    return PyLong_FromUnsignedLongLong(stx_trace_count());
}

PyObject *stx_py_trace_fallback(PyObject *py_module, PyObject *py_reason) {
    const char *reason = stx_trace_is_on() ? PyUnicode_AsUTF8AndSize(py_reason, NULL) : NULL;
    (void)py_module;
    if (reason != NULL) stx_trace_fallback(reason);
    PyErr_Clear(); /* a device may be called anything: the hand-over goes on */
    return Py_NewRef(Py_None);
}

/* Takes `py_value`. 0, or -1 with an exception. */
static int set(PyObject *py_arguments, const char *name, PyObject *py_value) {
    const int result = py_value == NULL ? -1 : PyDict_SetItemString(py_arguments, name, py_value);
    Py_XDECREF(py_value);
    return result;
}

/* A text that may have been cut within a character; nothing where there is none. */
static int set_text(PyObject *py_arguments, const char *name, const char *text) {
    if (name == NULL || text == NULL) return 0;
    return set(py_arguments, name, PyUnicode_DecodeUTF8(text, (Py_ssize_t)strlen(text), "replace"));
}

static int fill(PyObject *py_arguments, const struct stx_trace_record *record) {
    const struct stx_trace_info *info = stx_trace_info((enum stx_trace_kind)record->kind);
    if (set_text(py_arguments, "file", stx_trace_label_text(record->label)) != 0 ||
        set_text(py_arguments, info->text, record->text) != 0 ||
        set_text(py_arguments, info->words, stx_trace_label_text(record->words)) != 0)
        return -1;
    for (size_t i = 0; i < STX_TRACE_NUMBERS && info->numbers[i] != NULL; i++)
        if (set(py_arguments, info->numbers[i], PyLong_FromUnsignedLongLong(record->numbers[i])) !=
            0)
            return -1;
    return 0;
}

/* 0, or -1 with an exception. */
static int append(PyObject *py_events, const struct stx_trace_record *record) {
    const struct stx_trace_info *info = stx_trace_info((enum stx_trace_kind)record->kind);
    PyObject *py_arguments = PyDict_New();
    PyObject *py_event = NULL;
    if (py_arguments != NULL && fill(py_arguments, record) == 0)
        py_event = Py_BuildValue(
            "(siKKIO)", info->name, (int)info->shape, (unsigned long long)record->begin_ns,
            (unsigned long long)record->end_ns, (unsigned)record->thread, py_arguments);
    const int result = py_event == NULL ? -1 : PyList_Append(py_events, py_event);
    Py_XDECREF(py_event);
    Py_XDECREF(py_arguments);
    return result;
}

PyObject *stx_py_trace_events(PyObject *py_module, PyObject *py_first) {
    struct stx_trace_record record;
    const uint64_t count = stx_trace_count();
    uint64_t first = PyLong_AsUnsignedLongLong(py_first);
    (void)py_module;
    if (PyErr_Occurred()) return NULL;
    uint64_t lost_count = 0;
    if (count > STX_TRACE_RECORDS && first < count - STX_TRACE_RECORDS) {
        lost_count = count - STX_TRACE_RECORDS - first;
        first += lost_count;
    }
    PyObject *py_events = PyList_New(0);
    for (uint64_t i = first; py_events != NULL && i < count; i++) {
        const bool is_whole = stx_trace_get(i, &record);
        if (!is_whole) lost_count++;
        if (is_whole && append(py_events, &record) != 0) Py_CLEAR(py_events);
    }
    if (py_events == NULL) return NULL;
    return Py_BuildValue("(NK)", py_events, (unsigned long long)lost_count);
}
