/* SPDX-License-Identifier: Apache-2.0
 *
 * The iterator that `tensors()` returns: (name, tensor) in file order, each tensor in memory of its
 * own, read by one thread of the core while the consumer is busy, within a window of memory. GIL
 * held.
 */
#ifndef STX_PY_STREAM_H
#define STX_PY_STREAM_H

#include "py_handle.h"

/* A new iterator over what `self` keeps. Reading begins at once. NULL with an exception. */
PyObject *stx_py_stream_new(struct stx_py_handle *self);

#endif
