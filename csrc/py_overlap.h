/* SPDX-License-Identifier: Apache-2.0
 *
 * Whether open handles have a name in common, asked from Python. GIL held.
 */
#ifndef STX_PY_OVERLAP_H
#define STX_PY_OVERLAP_H

#include <Python.h>

/* _C.names_overlap(handles) -> bool, of a list. True also where it cannot be told: something in it
 * is no handle of ours, or closed. NULL with MemoryError or TypeError. */
PyObject *stx_py_names_overlap(PyObject *py_module, PyObject *py_handles);

#endif
