/* SPDX-License-Identifier: Apache-2.0
 *
 * While a load waits: whoever watches its progress is told, and a signal handler that raises ends
 * it.
 */
#ifndef STX_PY_PATIENCE_H
#define STX_PY_PATIENCE_H

#include <stdbool.h>

#include "load.h"
#include "py_handle.h"

/* Of one load, which goes on without the GIL. */
struct stx_py_patience {
    PyThreadState *thread;                 /* of the caller, saved */
    const struct stx_py_handle *reporting; /* NULL: nobody is told */
    const struct stx_load_result *result;  /* of the load, as far as it is */
    bool raised;
};

/* A `keep_going` whose context is a stx_py_patience: takes the GIL and asks. False with an
 * exception set. */
bool stx_py_patience_ask(void *context);

/* Tell the handle's progress that so much of what is kept is there; all of it ends it. 0, or -1
 * with what the user's callable raised. */
int stx_py_progress_report(const struct stx_py_handle *self, uint64_t done_bytes);

/* The load that was told of is over. 0, or -1 with what came in between (Ctrl-C). */
int stx_py_progress_stop(const struct stx_py_handle *self);

/* The same where nothing can be raised. An exception that is set stays. */
void stx_py_progress_drop(const struct stx_py_handle *self);

#endif
