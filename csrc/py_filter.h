/* SPDX-License-Identifier: Apache-2.0
 *
 * The filter: which tensors of a header exist for the caller. It runs once per header entry, in
 * offset order, before anything is planned or read. GIL held.
 */
#ifndef STX_PY_FILTER_H
#define STX_PY_FILTER_H

#include <stdbool.h>

#include "py_names.h"
#include "py_state.h"

/* Set keep[i] to 1 or 0 for every tensor of the header behind `names`. `py_rule` is a rule as
 * stx_patch._filter makes it; `py_filename` becomes TensorKey.filename. 0, or -1 with an exception:
 * what a user's callable raised comes out as the same object. `*asked_python`: whether the
 * rule looks at more than the header (a callable, the path), so that it may decide otherwise
 * another time; NULL if nobody wants to know. */
int stx_py_filter_run(struct stx_py_state *state, PyObject *py_rule, PyObject *py_filename,
                      struct stx_py_names *names, uint8_t *keep, bool *asked_python);

/* _C.match_rule(rule, name) -> bool, for rules without callables. */
PyObject *stx_py_filter_match(PyObject *py_module, PyObject *py_arguments);

#endif
