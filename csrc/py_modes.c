/* SPDX-License-Identifier: Apache-2.0
 *
 * Asks torch how many modes are active; a torch that does not tell has none.
 */
#include "py_modes.h"

static int read_depth(PyObject *py_function) {
    if (py_function == NULL) return 0;
    PyObject *py_depth = PyObject_CallNoArgs(py_function);
    if (py_depth == NULL) return -1;
    const long depth = PyLong_AsLong(py_depth);
    Py_DECREF(py_depth);
    return (int)depth;
}

int stx_py_torch_dispatch_depth(const struct stx_py_state *state) {
    return read_depth(state->torch.dispatch_stack_depth);
}

int stx_py_torch_function_depth(const struct stx_py_state *state) {
    return read_depth(state->torch.function_stack_depth);
}

int stx_py_torch_pause_collections(const struct stx_py_state *state) {
    const int depth = stx_py_torch_function_depth(state);
    if (depth < 0) PyErr_Clear();
    return depth == 0 && PyGC_Disable();
}
