/* SPDX-License-Identifier: Apache-2.0
 *
 * Arguments of methods that stand in for stock's: the same calls are accepted and the same texts
 * come out of wrong ones. GIL held.
 */
#ifndef STX_PY_ARGS_H
#define STX_PY_ARGS_H

#include <Python.h>

#define STX_PY_ARGS_MAX 4

/* Bind a METH_FASTCALL | METH_KEYWORDS call to `count` required parameters, each positional or by
 * keyword, into `py_bound` (borrowed from the caller's arguments). `function` is the name shown in
 * errors, such as "safe_open.get_tensor". 0, or -1 with TypeError. */
int stx_py_args_bind(const char *function, const char *const *parameters, Py_ssize_t count,
                     PyObject *const *py_arguments, Py_ssize_t positional_count,
                     PyObject *py_keywords, PyObject **py_bound);

/* The single parameter `name`, bound, of whatever type. Borrowed; NULL with TypeError. */
PyObject *stx_py_args_name(const char *function, PyObject *const *py_arguments,
                           Py_ssize_t positional_count, PyObject *py_keywords);

#endif
