/* SPDX-License-Identifier: Apache-2.0
 *
 * The plan of one file as Python knows it: built for a load, or told to whoever asks what a load
 * would do. GIL held.
 */
#ifndef STX_PY_PLAN_H
#define STX_PY_PLAN_H

#include <stdint.h>

#include "follow.h"
#include "plan.h"
#include "py_state.h"

/* Build the plan of what `keep` (NULL keeps all) keeps of a file that is mapped. 0, or -1 with
 * MemoryError; the caller frees it. */
int stx_py_plan_build(struct stx_plan *plan, const struct stx_header *header, const uint8_t *keep);

/* The plan's reads, for the read-ahead: freed with free(). NULL without memory. No GIL needed. */
struct stx_range *stx_py_plan_ranges(const struct stx_plan *plan);

/* _C.explain(path, rule, reads) -> dict: header and filter are gone through, then the plan is told
 * instead of run; nothing is counted. Raises _C.Refused, or what a filter raises. */
PyObject *stx_py_plan_explain(PyObject *py_module, PyObject *py_arguments);

#endif
