/* SPDX-License-Identifier: Apache-2.0
 *
 * Opens a file for Python: all that can fail happens here, before anything is read but the header.
 *
 * DESIGN. Header and mapping are made without the GIL, so that many threads open shards at once;
 * then, with it, the filter decides which entries exist. The order is the promise: a filter has
 * been asked about every entry before any read is planned.
 */
#include <string.h>

#include "py_err.h"
#include "py_filter.h"
#include "py_handle.h"
#include "py_keeps.h"
#include "py_tensor.h"
#include "trace.h"

/* Sum up what is kept; the plan of this handle is made when something is to be read. */
static void count_kept(struct stx_py_handle *self) {
    const struct stx_header *header = &self->source.header;
    struct stx_py_counters *counters = &self->state->counters;
    uint64_t total_bytes = 0;
    for (size_t i = 0; i < header->tensors_count; i++) {
        const uint64_t size_bytes = header->tensors[i].end - header->tensors[i].begin;
        total_bytes += size_bytes;
        if (!stx_py_handle_keeps(self, i)) continue;
        self->kept_count++;
        self->kept_bytes += size_bytes;
    }
    counters->keys_kept += self->kept_count;
    self->skipped_count = header->tensors_count - self->kept_count;
    counters->keys_skipped += self->skipped_count;
    counters->bytes_kept += self->kept_bytes;
    counters->bytes_skipped += total_bytes - self->kept_bytes;
}

/* `decided_by` is told where there is a filter: "rule", "callable", or "memory". */
static int apply_filter(struct stx_py_handle *self, PyObject *py_rule, PyObject *py_path,
                        const char **decided_by) {
    const uint64_t start_ns = stx_py_clock_ns();
    if (py_rule == Py_None) return 0;
    *decided_by = "memory";
    self->keep = PyMem_Calloc(self->source.header.tensors_count + 1, 1);
    if (self->keep == NULL) return PyErr_NoMemory(), -1;
    const size_t count = self->source.header.tensors_count;
    const uint64_t number = stx_shared_header_number(self->source.shared);
    int result = 0;
    bool asked_python = false;
    if (!stx_py_keeps_find(self->state, number, py_rule, self->keep, count)) {
        result = stx_py_filter_run(self->state, py_rule, py_path, &self->names, self->keep,
                                   &asked_python);
        *decided_by = asked_python ? "callable" : "rule";
        if (result == 0 && !asked_python)
            stx_py_keeps_add(self->state, number, py_rule, self->keep, count);
    }
    self->state->counters.filter_ns += stx_py_clock_ns() - start_ns;
    return result;
}

/* The descriptor of a source that is read moves to where slices can share it. */
static int share_file(struct stx_py_handle *self) {
    self->file = PyMem_Malloc(sizeof *self->file);
    if (self->file == NULL) return PyErr_NoMemory(), -1;
    *self->file = (struct stx_py_file){.users = 1, .file = self->source.file};
    self->source.file.fd = -1;
    return 0;
}

/* Tell the origin which file this is, so that it can refuse another one later. */
static int pass_identity(const struct stx_py_handle *self) {
    const struct stx_file_identity *identity = &self->source.file.identity;
    PyObject *py_identity = Py_BuildValue(
        "(KKKL)", (unsigned long long)identity->device, (unsigned long long)identity->inode,
        (unsigned long long)identity->size_bytes, (long long)identity->mtime_ns);
    if (py_identity == NULL) return -1;
    const int result = PyObject_SetAttrString(self->py_origin, "identity", py_identity);
    Py_DECREF(py_identity);
    return result;
}

/* A new handle that owns `source` from here on, also when this fails. */
static struct stx_py_handle *new_handle(struct stx_py_state *state, struct stx_source *source,
                                        const struct stx_py_options *options, PyObject *py_origin) {
    struct stx_py_handle *self = PyObject_GC_New(struct stx_py_handle, state->handle_type);
    if (self == NULL) {
        stx_source_close(source);
        return NULL;
    }
    self->state = state;
    self->source = *source;
    self->file = NULL;
    self->names = (struct stx_py_names){0};
    self->keep = NULL;
    self->sorted = NULL;
    self->kept_count = 0;
    self->skipped_count = 0;
    self->kept_bytes = 0;
    self->py_origin = Py_NewRef(py_origin);
    self->busy = 0;
    self->closed = false;
    self->demands_count = 0;
    self->ahead_counted = false;
    self->options = *options;
    self->ahead = options->read_ahead_bytes == 0 || source->mapping == NULL ? STX_AHEAD_OFF
                                                                            : STX_AHEAD_UNDECIDED;
    return self;
}

int stx_py_source_open(struct stx_py_state *state, struct stx_source *source, PyObject *py_path,
                       enum stx_source_how how) {
    if (stx_py_err_load(state) != 0 || stx_py_torch_load(state) != 0) return -1;
    return stx_py_source_read(state, source, py_path, how);
}

int stx_py_source_read(struct stx_py_state *state, struct stx_source *source, PyObject *py_path,
                       enum stx_source_how how) {
    struct stx_err err;
    enum stx_status status;
    Py_ssize_t path_bytes = 0;
    const char *path = PyUnicode_AsUTF8AndSize(py_path, &path_bytes);
    if (path == NULL || strlen(path) != (size_t)path_bytes) {
        PyErr_Clear();
        (void)stx_err_set(&err, STX_ERR_UNSUPPORTED, "the path is no UTF-8 or holds NUL");
        (void)stx_py_raise_refused(state, &err);
        return -1;
    }
    Py_BEGIN_ALLOW_THREADS;
    status = stx_source_open(source, path, how, &err);
    Py_END_ALLOW_THREADS;
    if (status == STX_OK) return 0;
    stx_trace_error(stx_trace_label(path), err.position_bytes, &err);
    (void)stx_py_raise_refused(state, &err);
    return -1;
}

PyObject *stx_py_handle_open(PyObject *py_module, PyObject *py_arguments) {
    struct stx_py_state *state = PyModule_GetState(py_module);
    struct stx_source source;
    struct stx_py_options options = {0};
    PyObject *py_path, *py_rule, *py_origin;
    long long read_ahead_bytes = -1, inflight_bytes = 0;
    int reads = 0;
    if (!PyArg_ParseTuple(py_arguments, "UOO(iLLi)p:open", &py_path, &py_rule, &py_origin,
                          &options.engine, &read_ahead_bytes, &inflight_bytes, &options.direct_io,
                          &reads))
        return NULL;
    options.read_ahead_bytes = read_ahead_bytes;
    options.inflight_bytes = inflight_bytes;
    const char *decided_by = NULL;
    const uint64_t start_ns = stx_py_clock_ns(), open_ns = stx_trace_begin();
    const int opened =
        stx_py_source_open(state, &source, py_path, reads ? STX_SOURCE_FILE : STX_SOURCE_MAPPED);
    state->counters.header_ns += stx_py_clock_ns() - start_ns;
    if (opened != 0) return NULL;
    state->counters.requests += source.header_reads_count;
    state->counters.bytes_read += source.header_read_bytes;
    state->counters.headers_reused += source.header_reused;
    STX_TRACE(STX_TRACE_OPEN, open_ns, source.file.label,
              source.header_reused ? "reused" : "parsed", source.header_read_bytes,
              source.header_reads_count, source.header.file_size_bytes,
              source.header.tensors_count);
    const uint64_t filter_ns = stx_trace_begin();
    struct stx_py_handle *self = new_handle(state, &source, &options, py_origin);
    if (self == NULL) return NULL;
    if ((reads && share_file(self) != 0) ||
        stx_py_names_init(&self->names, &self->source.header) != 0 || pass_identity(self) != 0 ||
        apply_filter(self, py_rule, py_path, &decided_by) != 0) {
        Py_DECREF(self);
        return NULL;
    }
    state->counters.opens++;
    count_kept(self);
    if (decided_by != NULL)
        STX_TRACE(STX_TRACE_FILTER, filter_ns, self->source.file.label, decided_by,
                  self->kept_count, self->skipped_count, self->kept_bytes,
                  self->source.header.file_size_bytes - self->source.header.data_begin_bytes -
                      self->kept_bytes);
    PyObject_GC_Track((PyObject *)self); /* not before: a filter could find it half open */
    return (PyObject *)self;
}
