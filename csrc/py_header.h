/* SPDX-License-Identifier: Apache-2.0
 *
 * The header of a file for stx_patch/_header.py, which copies and lists tensors and makes none. GIL
 * held. Needs no torch.
 */
#ifndef STX_PY_HEADER_H
#define STX_PY_HEADER_H

#include <Python.h>

/* _C.read_header(path, rule) -> (fd, identity, metadata, entries, keep). `fd` is a descriptor of
 * the file that was read, the caller's to close; `identity` is (device, inode, size_bytes,
 * mtime_ns); `entries` is a list of (name, dtype, shape, begin, end) in file order, offsets in the
 * file; `keep` has a byte for each, 1 where `rule` keeps it, and is None for a rule of None. NULL
 * with _C.Refused or what a filter raised. */
PyObject *stx_py_header_read(PyObject *py_module, PyObject *py_arguments);

#endif
