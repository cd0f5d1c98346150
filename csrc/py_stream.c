/* SPDX-License-Identifier: Apache-2.0
 *
 * Streams as Python iterators.
 *
 * DESIGN. An iterator keeps its handle's table alive by being inside of it, as a running method is:
 * closing the handle ends the iteration with "File is closed", and frees when the iterator goes.
 * It may be advanced by any thread, by one at a time. In a forked child the reading thread is gone:
 * the first step there begins to read anew where the parent was.
 */
#include "py_stream.h"

#include <fcntl.h>
#include <unistd.h>

#include "py_err.h"
#include "py_modes.h"
#include "py_owned.h"
#include "py_patience.h"
#include "py_tensor.h"
#include "stream.h"
#include "trace.h"

/* Read and not handed out, at most; larger tensors raise it. */
#define WINDOW_BYTES (UINT64_C(128) << 20)
/* Of the bytes in flight, where the user sets those. */
#define WINDOW_FACTOR 4

struct iterator {
    PyObject_HEAD struct stx_py_handle *handle; /* owned; we count in its `busy` */
    struct stx_stream *stream;
    struct stx_stream_piece piece;
    uint32_t next;       /* tensor to be handed out */
    uint64_t done_bytes; /* of tensors handed out */
    pid_t pid;
    bool running; /* a thread is in __next__ */
    bool ended;
};

/* --- the file --- */

/* A descriptor of its own for the stream: the handle's doubled, or, of a mapped file, a new one of
 * the very same file. 0, or -1 with an exception. */
static int open_file(const struct stx_py_handle *handle, struct stx_file *file) {
    const struct stx_file_identity *was = &handle->source.file.identity;
    struct stx_err err;
    if (handle->file != NULL) {
        *file = handle->file->file;
        file->fd = fcntl(handle->file->file.fd, F_DUPFD_CLOEXEC, 0);
        if (file->fd >= 0) return 0;
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    PyObject *py_path = PyObject_GetAttrString(handle->py_origin, "_path");
    const char *path = py_path == NULL ? NULL : PyUnicode_AsUTF8AndSize(py_path, NULL);
    int result = -1;
    if (path != NULL && stx_file_open(file, path, &err) != STX_OK) {
        PyErr_Format(handle->state->safetensors_error, "%U: %s", py_path, err.message);
    } else if (path != NULL) {
        const struct stx_file_identity *is = &file->identity;
        result = is->device == was->device && is->inode == was->inode &&
                         is->size_bytes == was->size_bytes && is->mtime_ns == was->mtime_ns
                     ? 0
                     : -1;
        if (result != 0) {
            stx_file_close(file);
            PyErr_Format(handle->state->safetensors_error, "%U has changed since it was opened",
                         py_path);
        }
    }
    Py_XDECREF(py_path);
    return result;
}

static uint64_t window_of(const struct stx_py_handle *handle) {
    const int64_t inflight = handle->options.inflight_bytes;
    return inflight == 0 ? WINDOW_BYTES : (uint64_t)inflight * WINDOW_FACTOR;
}

static int begin(struct iterator *self) {
    struct stx_py_handle *handle = self->handle;
    const struct stx_owned_options options = stx_py_owned_options(handle);
    struct stx_file file = {.fd = -1};
    struct stx_err err;
    enum stx_status status;
    if (open_file(handle, &file) != 0) return -1;
    Py_BEGIN_ALLOW_THREADS; /* we are inside the handle */
    status = stx_stream_open(&self->stream, &file, &handle->source.header, handle->keep, self->next,
                             &options, window_of(handle), &err);
    Py_END_ALLOW_THREADS;
    self->pid = getpid();
    if (status == STX_OK) return 0;
    PyErr_Format(status == STX_ERR_MEMORY ? PyExc_MemoryError : PyExc_OSError, "%s", err.message);
    return -1;
}

/* --- its life --- */

/* End the reading. Once; later calls do nothing. */
static void end(struct iterator *self) {
    struct stx_stream *const stream = self->stream;
    struct stx_owned_way way;
    uint64_t wanted_bytes;
    self->stream = NULL;
    self->ended = true;
    stx_arena_release(self->piece.arena);
    self->piece = (struct stx_stream_piece){.arena = NULL};
    if (stream == NULL) return;
    if (self->pid != getpid()) {
        stx_stream_abandon(stream);
        return;
    }
    Py_BEGIN_ALLOW_THREADS;
    stx_stream_stop(stream);
    Py_END_ALLOW_THREADS;
    const struct stx_load_result result = stx_stream_result(stream, &wanted_bytes, &way);
    stx_py_owned_count(self->handle, &result, wanted_bytes, &way);
    Py_BEGIN_ALLOW_THREADS;
    stx_stream_close(stream);
    Py_END_ALLOW_THREADS;
}

PyObject *stx_py_stream_new(struct stx_py_handle *handle) {
    struct iterator *self = PyObject_GC_New(struct iterator, handle->state->stream_type);
    if (self == NULL) return NULL;
    self->handle = (struct stx_py_handle *)Py_NewRef((PyObject *)handle);
    handle->busy++;
    self->stream = NULL;
    self->piece = (struct stx_stream_piece){.arena = NULL};
    self->next = 0;
    self->done_bytes = 0;
    self->pid = getpid();
    self->running = false;
    self->ended = false;
    const int begun = begin(self);
    PyObject_GC_Track((PyObject *)self); /* not before: somebody could find it half made */
    if (begun == 0) return (PyObject *)self;
    Py_DECREF(self);
    return NULL;
}

static int iterator_traverse(PyObject *py_self, visitproc visit, void *arg) {
    Py_VISIT(Py_TYPE(py_self));
    Py_VISIT((PyObject *)((struct iterator *)py_self)->handle);
    return 0;
}

static int iterator_clear(PyObject *py_self) {
    (void)py_self; /* a cycle through the handle is broken at its origin */
    return 0;
}

static void iterator_dealloc(PyObject *py_self) {
    struct iterator *self = (struct iterator *)py_self;
    PyTypeObject *type = Py_TYPE(py_self);
    PyObject_GC_UnTrack(py_self);
    if (!self->ended) stx_py_progress_drop(self->handle);
    end(self);
    stx_py_handle_leave(self->handle);
    Py_DECREF((PyObject *)self->handle);
    PyObject_GC_Del(py_self);
    Py_DECREF(type);
}

/* --- iteration --- */

/* Wait for the next piece. 1, 0 at the end, -1 with an exception. */
static int fetch(struct iterator *self) {
    const uint64_t start_ns = stx_py_clock_ns(), begin_ns = stx_trace_begin();
    uint64_t failed_offset_bytes = 0;
    struct stx_err err;
    enum stx_status status = STX_OK;
    bool ready = false;
    stx_arena_release(self->piece.arena);
    self->piece.arena = NULL;
    if (stx_py_progress_report(self->handle, self->done_bytes) != 0) return -1;
    while (status == STX_OK && !ready) {
        Py_BEGIN_ALLOW_THREADS;
        status =
            stx_stream_next(self->stream, 100, &self->piece, &ready, &failed_offset_bytes, &err);
        Py_END_ALLOW_THREADS;
        if (PyErr_CheckSignals() != 0) return -1;
        if (status == STX_OK && !ready &&
            stx_py_progress_report(self->handle, self->done_bytes) != 0)
            return -1;
    }
    self->handle->state->counters.read_ns += stx_py_clock_ns() - start_ns;
    STX_TRACE(STX_TRACE_WAIT, begin_ns, stx_stream_file(self->stream)->label, "tensors", 0);
    if (status != STX_OK) {
        (void)stx_py_owned_raise(self->handle, stx_stream_file(self->stream), self->next,
                                 failed_offset_bytes, &err);
        return -1;
    }
    return self->piece.tensors_count != 0;
}

static PyObject *make_pair(struct iterator *self, size_t index) {
    struct stx_py_handle *handle = self->handle;
    const struct stx_header *header = &handle->source.header;
    const struct stx_tensor *tensor = &header->tensors[index];
    const int dispatch_depth = stx_py_torch_dispatch_depth(handle->state);
    PyObject *py_name = dispatch_depth < 0 ? NULL : stx_py_names_get(&handle->names, index);
    PyObject *py_tensor = NULL;
    if (py_name == NULL) return NULL;
    self->done_bytes += tensor->end - tensor->begin;
    if (dispatch_depth != 0 || !stx_py_tensor_is_native(tensor)) {
        py_tensor = PyObject_CallMethod(handle->py_origin, "stock_tensor", "O", py_name);
    } else {
        const uint64_t place = tensor->begin == tensor->end
                                   ? 0
                                   : stx_plan_place(self->piece.reads, self->piece.reads_count,
                                                    header->data_begin_bytes + tensor->begin);
        py_tensor = stx_py_tensor_make_owned(handle->state, self->piece.arena, place, tensor);
    }
    return py_tensor == NULL ? NULL : Py_BuildValue("(ON)", py_name, py_tensor);
}

/* The next kept tensor, or NULL without an exception at the end. */
static PyObject *advance(struct iterator *self) {
    for (;;) {
        if (self->handle->closed) return stx_py_raise_closed(self->handle->state);
        const uint32_t behind = self->piece.tensor_first + self->piece.tensors_count;
        while (self->next < behind && !stx_py_handle_keeps(self->handle, self->next)) self->next++;
        if (self->next < behind) return make_pair(self, self->next++);
        const int fetched = fetch(self);
        if (fetched <= 0) return NULL;
    }
}

/* In a forked child: what the parent's thread was reading is read here from the next tensor on. */
static int begin_again(struct iterator *self) {
    stx_stream_abandon(self->stream);
    self->stream = NULL;
    stx_arena_release(self->piece.arena);
    self->piece = (struct stx_stream_piece){.arena = NULL};
    return begin(self);
}

static PyObject *iterator_next(PyObject *py_self) {
    struct iterator *self = (struct iterator *)py_self;
    if (self->running) {
        PyErr_SetString(PyExc_ValueError, "tensors() is being advanced by another thread");
        return NULL;
    }
    if (self->ended) return NULL;
    self->running = true;
    const bool can_go_on = self->pid == getpid() || begin_again(self) == 0;
    PyObject *py_pair = can_go_on ? advance(self) : NULL;
    self->running = false;
    if (py_pair == NULL) {
        PyObject *py_type, *py_value, *py_traceback;
        PyErr_Fetch(&py_type, &py_value, &py_traceback);
        end(self);
        PyErr_Restore(py_type, py_value, py_traceback);
        if (PyErr_Occurred())
            stx_py_progress_drop(self->handle);
        else
            (void)stx_py_progress_stop(self->handle);
    }
    return py_pair;
}

static PyObject *iterator_close(PyObject *py_self, PyObject *py_unused) {
    struct iterator *self = (struct iterator *)py_self;
    (void)py_unused;
    if (self->running) {
        PyErr_SetString(PyExc_ValueError, "tensors() is being advanced by another thread");
        return NULL;
    }
    const bool was_open = !self->ended;
    end(self);
    if (was_open && stx_py_progress_stop(self->handle) != 0) return NULL;
    return Py_NewRef(Py_None);
}

static PyMethodDef iterator_methods[] = {
    {"close", iterator_close, METH_NOARGS,
     PyDoc_STR("close($self)\n--\n\nStop reading; what was handed out stays.")},
    {NULL, NULL, 0, NULL}};

static PyType_Slot iterator_slots[] = {
    {Py_tp_doc, (void *)(uintptr_t) "Tensors of a safetensors file, one after the other."},
    {Py_tp_dealloc, iterator_dealloc},
    {Py_tp_traverse, iterator_traverse},
    {Py_tp_clear, iterator_clear},
    {Py_tp_iter, PyObject_SelfIter},
    {Py_tp_iternext, iterator_next},
    {Py_tp_methods, iterator_methods},
    {0, NULL}};

PyType_Spec stx_py_stream_spec = {.name = "stx_patch._C.Tensors",
                                  .basicsize = sizeof(struct iterator),
                                  .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC |
                                           Py_TPFLAGS_DISALLOW_INSTANTIATION |
                                           Py_TPFLAGS_IMMUTABLETYPE,
                                  .slots = iterator_slots};
