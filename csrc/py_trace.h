/* SPDX-License-Identifier: Apache-2.0
 *
 * The flight recorder for Python: begin, end, and what was recorded, with its names. GIL held.
 */
#ifndef STX_PY_TRACE_H
#define STX_PY_TRACE_H

#include <Python.h>

/* _C.trace_start(). MemoryError. */
PyObject *stx_py_trace_start(PyObject *py_module, PyObject *py_unused);

/* _C.trace_stop() */
PyObject *stx_py_trace_stop(PyObject *py_module, PyObject *py_unused);

/* _C.trace_count() -> int: the number of the next record. */
PyObject *stx_py_trace_count(PyObject *py_module, PyObject *py_unused);

/* _C.trace_events(first): a list of the records from that number on, in their order, and how many
 * more are lost. */
PyObject *stx_py_trace_events(PyObject *py_module, PyObject *py_first);

/* _C.trace_fallback(reason) */
PyObject *stx_py_trace_fallback(PyObject *py_module, PyObject *py_reason);

#endif
