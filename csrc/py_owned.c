/* SPDX-License-Identifier: Apache-2.0
 *
 * Owned tensors of a handle. The plan is built first and memory for all of it asked for, then the
 * core reads without the GIL; tensors are made last, when nothing can be written any more.
 */
#include "py_owned.h"

#include <string.h>
#include <sys/stat.h>

#include "checked.h"
#include "py_err.h"
#include "py_modes.h"
#include "py_patience.h"
#include "py_tensor.h"
#include "trace.h"

/* --- the descriptor --- */

struct stx_py_file *stx_py_file_retain(struct stx_py_file *file) {
    if (file != NULL) file->users++;
    return file;
}

void stx_py_file_release(struct stx_py_file *file) {
    if (file == NULL || --file->users != 0) return;
    stx_file_close(&file->file);
    PyMem_Free(file);
}

/* --- what the core needs to know, and what it tells --- */

struct stx_owned_options stx_py_owned_options(const struct stx_py_handle *self) {
    return (struct stx_owned_options){.engine = (enum stx_engine_kind)self->options.engine,
                                      .direct_io = (enum stx_direct_io)self->options.direct_io,
                                      .inflight_bytes = (uint64_t)self->options.inflight_bytes};
}

void stx_py_owned_count(struct stx_py_handle *self, const struct stx_load_result *result,
                        uint64_t wanted_bytes, const struct stx_owned_way *way) {
    struct stx_py_state *state = self->state;
    struct stx_py_counters *counters = &state->counters;
    if (result->requests == 0) return; /* nothing was to be read, or could be */
    counters->requests += result->requests;
    counters->retries += result->retries;
    counters->bytes_read += result->bytes_read;
    if (result->bytes_read > wanted_bytes)
        counters->bytes_over_read += result->bytes_read - wanted_bytes;
    if (result->direct) counters->loads_direct++;
    if (!result->direct) counters->loads_buffered++;
    if (result->engine == NULL) return; /* too small for one, and for asking the page cache */
    state->engine = result->engine;
    state->why_buffered = result->direct ? NULL : way->why_buffered;
    if (self->ahead_counted) return;
    self->ahead_counted = true;
    if (!way->known) counters->files_unknown++;
    if (way->known && way->warm) counters->files_warm++;
    if (way->known && !way->warm) counters->files_cold++;
}

/* The first kept tensor, from `first` on, that a file which was cut short does not hold any more:
 * stock reads in that order. The last one, if the file has grown again. */
static size_t find_cut(const struct stx_py_handle *self, size_t first, uint64_t size_bytes) {
    const struct stx_header *header = &self->source.header;
    size_t last = first;
    for (size_t i = first; i < header->tensors_count; i++) {
        if (!stx_py_handle_keeps(self, i)) continue;
        last = i;
        if (header->data_begin_bytes + header->tensors[i].end > size_bytes) break;
    }
    return last;
}

/* The tensor that holds the byte at `offset_bytes` of the file, or the nearest behind it. */
static size_t find_tensor(const struct stx_header *header, uint64_t offset_bytes) {
    size_t first = 0, behind = header->tensors_count;
    const uint64_t at = offset_bytes - stx_min_u64(offset_bytes, header->data_begin_bytes);
    while (behind - first > 1) { /* the last tensor that begins at or before it */
        const size_t middle = first + (behind - first) / 2;
        if (header->tensors[middle].begin <= at) first = middle;
        if (header->tensors[middle].begin > at) behind = middle;
    }
    return first;
}

PyObject *stx_py_owned_raise(struct stx_py_handle *self, const struct stx_file *file, size_t first,
                             uint64_t offset_bytes, const struct stx_err *err) {
    PyObject *const py_error = self->state->safetensors_error;
    struct stat status;
    if (err->status != STX_ERR_IO) {
        PyObject *py_path = PyObject_GetAttrString(self->py_origin, "_path");
        if (py_path != NULL)
            PyErr_Format(err->status == STX_ERR_MEMORY ? PyExc_MemoryError : py_error, "%U: %s",
                         py_path, err->message);
        Py_XDECREF(py_path);
        return NULL;
    }
    const bool is_cut = err->sys_errno == 0 && fstat(file->fd, &status) == 0;
    const size_t index = is_cut ? find_cut(self, first, (uint64_t)status.st_size)
                                : find_tensor(&self->source.header, offset_bytes);
    PyObject *py_name = stx_py_names_get(&self->names, index);
    if (py_name == NULL) return NULL;
    if (err->sys_errno == 0)
        return PyErr_Format(
            py_error, "Could not read tensor %U from file: failed to fill whole buffer", py_name);
    return PyErr_Format(py_error, "Could not read tensor %U from file: %s (os error %d)", py_name,
                        strerror(err->sys_errno), err->sys_errno);
}

/* --- reading --- */

/* Read `plan` into `*arena`, which is made for it; progress is told of if it is all of the handle.
 * 0; or -1 with an exception, if a signal handler raised one, else with `err` and where in the file
 * that was. */
static int read_plan(struct stx_py_handle *self, const struct stx_plan *plan, bool is_all,
                     struct stx_arena **arena, uint64_t *failed_offset_bytes, struct stx_err *err) {
    const struct stx_owned_options options = stx_py_owned_options(self);
    struct stx_py_file *const file = self->file; /* `busy` keeps it open */
    struct stx_load_result result = {.failed_file = STX_LOAD_NO_FILE};
    struct stx_py_patience patience = {.reporting = is_all ? self : NULL, .result = &result};
    const struct stx_owned_patience core_patience = {.keep_going = stx_py_patience_ask,
                                                     .context = &patience};
    struct stx_owned_way way = {.why_buffered = NULL};
    const uint64_t memory_bytes =
        stx_plan_memory_bytes(plan->reads, plan->reads_count, STX_LOAD_ALIGN_BYTES);
    const uint64_t start_ns = stx_py_clock_ns();
    enum stx_status status;
    patience.thread = PyEval_SaveThread();
    status = stx_arena_open(arena, memory_bytes, err);
    if (status == STX_OK) {
        status =
            stx_owned_read(&file->file, plan, *arena, &options, &core_patience, &result, &way, err);
        if (status != STX_OK || result.cancelled) stx_arena_release(*arena);
    }
    PyEval_RestoreThread(patience.thread);
    self->state->counters.read_ns += stx_py_clock_ns() - start_ns;
    stx_py_owned_count(self, &result, plan->bytes_kept, &way);
    *failed_offset_bytes = result.failed_offset_bytes;
    if (status == STX_OK && result.cancelled) {
        if (!PyErr_Occurred()) PyErr_SetNone(PyExc_KeyboardInterrupt);
        (void)stx_err_set(err, STX_ERR_UNSUPPORTED, "interrupted");
        return -1;
    }
    return status == STX_OK ? 0 : -1;
}

/* The plan of what is kept of tensors [first, first + count); 0, or -1 with an exception. */
static int plan_tensors(const struct stx_py_handle *self, uint32_t first, uint32_t count,
                        struct stx_plan *plan) {
    const struct stx_header *header = &self->source.header;
    const struct stx_plan_input input = {
        .header = header, .keep = self->keep, .tensor_first = first, .tensors_count = count};
    const struct stx_plan_limits limits = stx_owned_limits(header->file_size_bytes);
    struct stx_err err;
    if (stx_plan_build(plan, &input, 1, &limits, &err) == STX_OK) return 0;
    PyErr_NoMemory();
    return -1;
}

/* Where tensor `index` lies in the memory of `plan`. */
static uint64_t place_of(const struct stx_py_handle *self, const struct stx_plan *plan,
                         size_t index) {
    const struct stx_tensor *tensor = &self->source.header.tensors[index];
    if (tensor->begin == tensor->end) return 0;
    return stx_plan_place(plan->reads, plan->reads_count,
                          self->source.header.data_begin_bytes + tensor->begin);
}

/* Memory with all that a plan reads, whose first tensor may be `first`. NULL with an exception. */
static struct stx_arena *run_plan(struct stx_py_handle *self, const struct stx_plan *plan,
                                  size_t first, bool is_all) {
    struct stx_arena *arena = NULL;
    struct stx_err err = {.status = STX_OK};
    uint64_t failed_offset_bytes = 0;
    if (read_plan(self, plan, is_all, &arena, &failed_offset_bytes, &err) == 0) {
        if (!is_all || (stx_py_progress_report(self, self->kept_bytes) == 0 &&
                        stx_py_progress_stop(self) == 0))
            return arena;
        stx_arena_release(arena);
    }
    if (!PyErr_Occurred())
        (void)stx_py_owned_raise(self, &self->file->file, first, failed_offset_bytes, &err);
    if (is_all) stx_py_progress_drop(self);
    return NULL;
}

/* --- what is handed out --- */

bool stx_py_owned_is_native(const struct stx_tensor *tensor) {
    return tensor->dtype != STX_DTYPE_F4 && stx_py_tensor_is_native(tensor);
}

PyObject *stx_py_owned_tensor(struct stx_py_handle *self, size_t index) {
    struct stx_plan plan;
    PyObject *py_tensor = NULL;
    if (plan_tensors(self, (uint32_t)index, 1, &plan) != 0) return NULL;
    struct stx_arena *arena = run_plan(self, &plan, index, false);
    if (arena != NULL)
        py_tensor = stx_py_tensor_make_owned(self->state, arena, place_of(self, &plan, index),
                                             &self->source.header.tensors[index]);
    stx_arena_release(arena);
    stx_plan_free(&plan);
    return py_tensor;
}

/* One tensor of a whole load: what is not made here comes from stock. */
static PyObject *hand_out(struct stx_py_handle *self, struct stx_arena *arena,
                          const struct stx_plan *plan, size_t index, int dispatch_depth) {
    const struct stx_tensor *tensor = &self->source.header.tensors[index];
    if (dispatch_depth != 0 || !stx_py_owned_is_native(tensor)) {
        PyObject *py_name = stx_py_names_get(&self->names, index);
        if (py_name == NULL) return NULL;
        return PyObject_CallMethod(self->py_origin, "stock_tensor", "O", py_name);
    }
    return stx_py_tensor_make_owned(self->state, arena, place_of(self, plan, index), tensor);
}

static PyObject *hand_out_all(struct stx_py_handle *self, struct stx_arena *arena,
                              const struct stx_plan *plan, int dispatch_depth) {
    const uint64_t start_ns = stx_py_clock_ns(), begin_ns = stx_trace_begin();
    PyObject *py_tensors = PyDict_New();
    const int paused = dispatch_depth == 0 && stx_py_torch_pause_collections(self->state);
    for (size_t i = 0; py_tensors != NULL && i < self->source.header.tensors_count; i++) {
        if (!stx_py_handle_keeps(self, i)) continue;
        PyObject *py_name = stx_py_names_get(&self->names, i);
        PyObject *py_tensor =
            py_name == NULL ? NULL : hand_out(self, arena, plan, i, dispatch_depth);
        if (py_tensor == NULL || PyDict_SetItem(py_tensors, py_name, py_tensor) != 0)
            Py_CLEAR(py_tensors);
        Py_XDECREF(py_tensor);
    }
    if (paused) (void)PyGC_Enable();
    self->state->counters.wrap_ns += stx_py_clock_ns() - start_ns;
    STX_TRACE(STX_TRACE_TENSORS, begin_ns, self->source.file.label, NULL, self->kept_count,
              py_tensors == NULL);
    return py_tensors;
}

PyObject *stx_py_owned_load(struct stx_py_handle *self, int dispatch_depth) {
    struct stx_plan plan = {0};
    if (dispatch_depth != 0) return hand_out_all(self, NULL, &plan, dispatch_depth); /* stock's */
    const uint64_t start_ns = stx_py_clock_ns(), begin_ns = stx_trace_begin();
    if (plan_tensors(self, 0, 0, &plan) != 0) return NULL;
    self->state->counters.plan_ns += stx_py_clock_ns() - start_ns;
    STX_TRACE(STX_TRACE_PLAN, begin_ns, self->source.file.label, NULL, plan.spans_count,
              plan.reads_count, plan.bytes_kept, plan.bytes_read);
    struct stx_arena *arena = run_plan(self, &plan, 0, true);
    PyObject *py_tensors = arena == NULL ? NULL : hand_out_all(self, arena, &plan, dispatch_depth);
    stx_arena_release(arena);
    stx_plan_free(&plan);
    return py_tensors;
}

PyObject *stx_py_owned_rows(struct stx_py_state *state, const struct stx_file *file,
                            uint64_t data_begin_bytes, const struct stx_tensor *tensor,
                            uint64_t first, uint64_t count) {
    const uint64_t row_bytes =
        tensor->shape[0] == 0 ? 0 : (tensor->end - tensor->begin) / tensor->shape[0];
    const uint64_t begin_bytes = data_begin_bytes + tensor->begin + first * row_bytes;
    uint64_t shape[64];
    struct stx_tensor rows = *tensor;
    struct stx_arena *arena = NULL;
    struct stx_load_result result = {.failed_file = STX_LOAD_NO_FILE};
    struct stx_err err;
    memcpy(shape, tensor->shape, tensor->rank * sizeof shape[0]);
    shape[0] = count;
    rows.shape = shape;
    rows.begin = 0;
    rows.end = count * row_bytes;
    enum stx_status status;
    Py_BEGIN_ALLOW_THREADS; /* whoever called keeps the descriptor open */
    status = stx_arena_open(&arena, rows.end, &err);
    if (status == STX_OK)
        status = stx_owned_read_one(file, stx_arena_bytes(arena), begin_bytes,
                                    begin_bytes + rows.end, &result, &err);
    Py_END_ALLOW_THREADS;
    state->counters.requests += result.requests;
    state->counters.bytes_read += result.bytes_read;
    PyObject *py_rows = NULL;
    if (status == STX_OK) {
        py_rows = stx_py_tensor_make_owned(state, arena, 0, &rows);
    } else if (status == STX_ERR_MEMORY) {
        PyErr_SetString(PyExc_MemoryError, err.message);
    } else {
        PyErr_Format(state->safetensors_error, "Could not read tensor bytes for slicing: %s",
                     err.sys_errno == 0 ? "failed to fill whole buffer" : strerror(err.sys_errno));
    }
    stx_arena_release(arena);
    return py_rows;
}
