/* SPDX-License-Identifier: Apache-2.0
 *
 * The Python strings of a header: names, made when first asked for and then kept, and metadata.
 * GIL held.
 */
#ifndef STX_PY_NAMES_H
#define STX_PY_NAMES_H

#include <Python.h>

#include "header.h"

/* Caller-owned; a zeroed struct is empty. */
struct stx_py_names {
    const struct stx_header *header; /* borrowed until stx_py_names_free */
    PyObject **items;                /* tensors_count, NULL where not made yet */
};

/* 0, or -1 with an exception. */
int stx_py_names_init(struct stx_py_names *names, const struct stx_header *header);

/* The name of tensor `index`, borrowed until stx_py_names_free. NULL with an exception. */
PyObject *stx_py_names_get(struct stx_py_names *names, size_t index);

/* Drop all strings. An empty struct is fine. */
void stx_py_names_free(struct stx_py_names *names);

/* `__metadata__` as a new dict, or None. NULL with an exception. */
PyObject *stx_py_names_metadata(const struct stx_header *header);

#endif
