/* SPDX-License-Identifier: Apache-2.0
 *
 * Reading a handle's tensors onto a device, for stx_patch/_device.py, which made their memory with
 * torch. GIL held.
 */
#ifndef STX_PY_DEVICE_H
#define STX_PY_DEVICE_H

#include <Python.h>

/* _C.device_read(handle, extents, device, stream, staging_bytes, tensors_count, tells): fill memory
 * on a device from the file of a handle that reads. `extents` is a list of (begin, end, address),
 * offsets in the file, ascending; they complete as many tensors as `tensors_count` says. `tells`:
 * whoever watches the progress of the handle is told. NULL with SafetensorError, MemoryError,
 * RuntimeError of the device, or what a signal handler raised; the memory may be freed then. */
PyObject *stx_py_device_read(PyObject *py_module, PyObject *py_arguments);

/* _C.device_place(handle, name) -> (dtype, shape, begin, end) of a kept tensor, offsets in the
 * file; `dtype` is torch's name for it, None where only stock makes it. NULL with
 * SafetensorError. */
PyObject *stx_py_device_place(PyObject *py_module, PyObject *py_arguments);

/* _C.device_runtime() -> bool: torch has a runtime of a device in this process that we can use. */
PyObject *stx_py_device_runtime(PyObject *py_module, PyObject *py_unused);

/* _C.device_bind(path): for tests, the runtime at `path`. */
PyObject *stx_py_device_bind(PyObject *py_module, PyObject *py_path);

#endif
