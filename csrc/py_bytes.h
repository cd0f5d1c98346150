/* SPDX-License-Identifier: Apache-2.0
 *
 * A whole safetensors file that is in memory, as a bytes object: checked as a file is, copied once
 * into memory that the tensors own. GIL held, given up while copying.
 */
#ifndef STX_PY_BYTES_H
#define STX_PY_BYTES_H

#include "py_state.h"

/* _C.load_bytes(data, rule) -> dict of tensors in file order. Raises Refused for what stock is to
 * judge; what a filter raises comes through as it is. */
PyObject *stx_py_bytes_load(PyObject *py_module, PyObject *py_arguments);

#endif
