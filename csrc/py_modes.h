/* SPDX-License-Identifier: Apache-2.0
 *
 * Modes of torch that change what a tensor is when it is made. GIL held.
 */
#ifndef STX_PY_MODES_H
#define STX_PY_MODES_H

#include "py_state.h"

/* Depth of torch's stack of dispatch modes (FakeTensorMode and kin), or of function modes (default
 * devices); 0 where torch does not tell. -1 with an exception. */
int stx_py_torch_dispatch_depth(const struct stx_py_state *state);
int stx_py_torch_function_depth(const struct stx_py_state *state);

/* Pause garbage collections while thousands of tensors are made, if no mode runs Python code
 * meanwhile: they would walk the whole process, and nothing made can be garbage yet. Whether they
 * were on; then PyGC_Enable ends the pause. */
int stx_py_torch_pause_collections(const struct stx_py_state *state);

#endif
