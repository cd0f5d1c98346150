/* SPDX-License-Identifier: Apache-2.0
 *
 * A ring of a few: a program has one or two filters, and few files at a time.
 */
#include "py_keeps.h"

#include <string.h>

bool stx_py_keeps_find(struct stx_py_state *state, uint64_t header_number, PyObject *py_rule,
                       uint8_t *keep, size_t count) {
    for (size_t i = 0; header_number != 0 && i < STX_PY_KEEPS_MAX; i++) {
        const struct stx_py_keep *const known = &state->keeps[i];
        if (known->header_number != header_number || known->count != count) continue;
        /* No code runs: what is known holds no callable, and a callable is no str or set. */
        const int is_equal = PyObject_RichCompareBool(known->py_rule, py_rule, Py_EQ);
        if (is_equal < 0) PyErr_Clear();
        if (is_equal != 1) continue;
        memcpy(keep, known->keep, count);
        return true;
    }
    return false;
}

void stx_py_keeps_add(struct stx_py_state *state, uint64_t header_number, PyObject *py_rule,
                      const uint8_t *keep, size_t count) {
    if (header_number == 0) return;
    uint8_t *copy = PyMem_Malloc(count + 1);
    if (copy == NULL) return;
    memcpy(copy, keep, count);
    struct stx_py_keep *const place = &state->keeps[state->keeps_next];
    PyObject *py_before = place->py_rule;
    PyMem_Free(place->keep);
    *place = (struct stx_py_keep){.header_number = header_number,
                                  .py_rule = Py_NewRef(py_rule),
                                  .keep = copy,
                                  .count = count};
    state->keeps_next = (state->keeps_next + 1) % STX_PY_KEEPS_MAX;
    Py_XDECREF(py_before); /* at last: what a finaliser finds is whole */
}

void stx_py_keeps_clear(struct stx_py_state *state) {
    for (size_t i = 0; i < STX_PY_KEEPS_MAX; i++) {
        PyObject *py_rule = state->keeps[i].py_rule;
        PyMem_Free(state->keeps[i].keep);
        state->keeps[i] = (struct stx_py_keep){.py_rule = NULL};
        Py_XDECREF(py_rule);
    }
}
