/* SPDX-License-Identifier: Apache-2.0
 *
 * The handle that safe_open returns for a file we serve: shared by the files that open it
 * (py_open.c), load all of it (py_load.c) and hold its methods (py_handle.c). GIL held.
 */
#ifndef STX_PY_HANDLE_H
#define STX_PY_HANDLE_H

#include <stdbool.h>

#include "py_names.h"
#include "py_state.h"
#include "py_tensor.h"
#include "source.h"

/* A descriptor that a handle and its slices share. GIL held. */
struct stx_py_file {
    size_t users;
    struct stx_file file;
};
struct stx_py_file *stx_py_file_retain(struct stx_py_file *file); /* NULL is fine */
void stx_py_file_release(struct stx_py_file *file);

/* What was asked for in `open`; numbers as _options.py gives them. */
struct stx_py_options {
    int engine; /* an enum stx_engine_kind */
    int direct_io;
    int64_t read_ahead_bytes; /* -1: automatic, 0: none */
    int64_t inflight_bytes;   /* 0: automatic */
};

/* What is known about reading ahead for a handle. */
enum stx_py_ahead {
    STX_AHEAD_OFF,       /* not wanted, or nothing mapped */
    STX_AHEAD_UNDECIDED, /* nothing, or one tensor, was asked for */
    STX_AHEAD_WARM,      /* the page cache has what is kept */
    STX_AHEAD_COLD,
};

struct stx_py_handle {
    PyObject_HEAD struct stx_py_state *state; /* borrowed: the type keeps the module */
    struct stx_source source;
    struct stx_py_file *file; /* backend="pread"; NULL where the source is mapped */
    struct stx_py_names names;
    uint8_t *keep;    /* flags in offset order; NULL keeps all */
    uint32_t *sorted; /* indexes by name, all tensors; NULL until keys() */
    size_t kept_count;
    size_t skipped_count;
    uint64_t kept_bytes;
    PyObject *py_origin;
    size_t busy;
    bool closed;
    enum stx_py_ahead ahead;
    bool ahead_counted;     /* what the page cache had of the file is in the counters */
    uint32_t demands_count; /* tensors and slices asked for while undecided */
    struct stx_py_options options;
};

/* Whether the filter kept the tensor at `index`. */
static inline bool stx_py_handle_keeps(const struct stx_py_handle *self, size_t index) {
    return self->keep == NULL || self->keep[index] != 0;
}

/* The index of the kept tensor called `py_name`, a str; -1 with stock's error. */
Py_ssize_t stx_py_handle_find(const struct stx_py_handle *self, PyObject *py_name);

/* Where this handle's tensors lie. Borrowed from the handle. */
struct stx_py_place stx_py_handle_place(const struct stx_py_handle *self);

/* The tensor at `index`, made here or by stock; `dispatch_depth` is torch's, asked once per call
 * from outside. NULL with an exception. */
PyObject *stx_py_handle_tensor(struct stx_py_handle *self, size_t index,
                               const struct stx_py_place *place, int dispatch_depth);

/* One of those who count in `busy` leaves: the last one of a closed handle frees it. */
void stx_py_handle_leave(struct stx_py_handle *self);

/* A dict of all kept tensors in file order (py_load.c). NULL with an exception. */
PyObject *stx_py_handle_load(struct stx_py_handle *self);

/* Open the file at `py_path`, a str, without the GIL meanwhile. 0, or -1 with _C.Refused or what
 * importing torch raised. */
int stx_py_source_open(struct stx_py_state *state, struct stx_source *source, PyObject *py_path,
                       enum stx_source_how how);

/* The same for whoever makes no tensors of it, and so needs no torch. */
int stx_py_source_read(struct stx_py_state *state, struct stx_source *source, PyObject *py_path,
                       enum stx_source_how how);

/* _C.open(path, rule, origin) -> handle. Opens natively or raises _C.Refused; what a filter raises
 * comes through as it is. `origin` is the Python object that reaches stock for this file. */
PyObject *stx_py_handle_open(PyObject *py_module, PyObject *py_arguments);

#endif
