/* SPDX-License-Identifier: Apache-2.0
 *
 * Bytes of any file into memory that somebody else has made, for stx_patch/ops.py. GIL held, given
 * up while reading.
 */
#ifndef STX_PY_READ_H
#define STX_PY_READ_H

#include <Python.h>

/* _C.read_into(path, offset, size_bytes, address, device, stream, staging_bytes): `device` -1 is
 * memory of this process. NULL with OSError, MemoryError, RuntimeError of a device, or what a
 * signal handler raised. */
PyObject *stx_py_read_into(PyObject *py_module, PyObject *py_arguments);

#endif
