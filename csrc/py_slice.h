/* SPDX-License-Identifier: Apache-2.0
 *
 * The lazy slice that get_slice returns: a name, a shape, a place in a mapping. Reads nothing
 * until it is indexed and outlives its handle. GIL held.
 */
#ifndef STX_PY_SLICE_H
#define STX_PY_SLICE_H

#include "header.h"
#include "py_handle.h"

/* A new slice of the tensor at `index`. It becomes a user of the place's mapping, or of `file`, and
 * holds `py_name` and `py_origin`. */
PyObject *stx_py_slice_new(struct stx_py_state *state, const struct stx_py_place *place,
                           struct stx_py_file *file, const struct stx_tensor *tensor, size_t index,
                           PyObject *py_name, PyObject *py_origin);

#endif
