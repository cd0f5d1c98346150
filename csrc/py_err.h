/* SPDX-License-Identifier: Apache-2.0
 *
 * The only place where a core error or a misuse becomes a Python exception. Every setter returns
 * NULL, so that a site reads `return stx_py_raise_closed(state);`. GIL held.
 */
#ifndef STX_PY_ERR_H
#define STX_PY_ERR_H

#include "err.h"
#include "py_state.h"

/* _C.Refused(kind, text): our reader will not serve this file; stock has the last word. */
PyObject *stx_py_raise_refused(const struct stx_py_state *state, const struct stx_err *err);

/* SafetensorError("File is closed"), stock's text. */
PyObject *stx_py_raise_closed(const struct stx_py_state *state);

/* SafetensorError for a name the handle does not show; stock's text, and a hint when a filter
 * left the name out. */
PyObject *stx_py_raise_missing(const struct stx_py_state *state, PyObject *py_name,
                               int left_out_by_filter);

/* Look up safetensors.SafetensorError once. 0, or -1 with an exception. */
int stx_py_err_load(struct stx_py_state *state);

#endif
