/* SPDX-License-Identifier: Apache-2.0
 *
 * What filters decided about headers that are opened again and again. Only decisions that took no
 * Python are remembered: a callable is asked each time, for its answer may change. GIL held.
 */
#ifndef STX_PY_KEEPS_H
#define STX_PY_KEEPS_H

#include <Python.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "py_state.h"

/* The flags that `py_rule` gave the header of this number, `count` of them, copied to `keep`; false
 * if they are not known. A header without a number (0) is not known. */
bool stx_py_keeps_find(struct stx_py_state *state, uint64_t header_number, PyObject *py_rule,
                       uint8_t *keep, size_t count);

/* Remember them, in place of the oldest. Where there is no memory, nothing is. */
void stx_py_keeps_add(struct stx_py_state *state, uint64_t header_number, PyObject *py_rule,
                      const uint8_t *keep, size_t count);

/* Forget all. */
void stx_py_keeps_clear(struct stx_py_state *state);

#endif
