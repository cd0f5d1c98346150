/* SPDX-License-Identifier: Apache-2.0
 *
 * Python has allocated all targets before it calls; here their addresses become extents, and the
 * core reads without the GIL.
 */
#include "py_device.h"

#include "py_err.h"
#include "py_handle.h"
#include "py_owned.h"
#include "py_patience.h"
#include "trace.h"
#include "transfer.h"

PyObject *stx_py_device_place(PyObject *py_module, PyObject *py_arguments) {
    const struct stx_py_state *const state = PyModule_GetState(py_module);
    PyObject *py_handle, *py_name;
    if (!PyArg_ParseTuple(py_arguments, "O!U:device_place", state->handle_type, &py_handle,
                          &py_name))
        return NULL;
    const struct stx_py_handle *const handle = (const struct stx_py_handle *)py_handle;
    if (handle->closed) return stx_py_raise_closed(state);
    const Py_ssize_t index = stx_py_handle_find(handle, py_name);
    if (index < 0) return NULL;
    const struct stx_tensor *const tensor = &handle->source.header.tensors[index];
    const uint64_t data_begin_bytes = handle->source.header.data_begin_bytes;
    const unsigned long long begin = data_begin_bytes + tensor->begin;
    const unsigned long long end = data_begin_bytes + tensor->end;
    const bool is_native = stx_py_owned_is_native(tensor);
    return Py_BuildValue("(zNKK)", is_native ? stx_dtype_info(tensor->dtype)->torch_name : NULL,
                         stx_py_tensor_shape(tensor), begin, end);
}

/* Fill `extents` from a list of (begin, end, address). The sum of their bytes, or -1 with an
 * exception. */
static int64_t take_extents(const struct stx_py_handle *handle, PyObject *py_extents,
                            struct stx_extent *extents) {
    const uint64_t size_bytes = handle->file->file.identity.size_bytes;
    uint64_t sum_bytes = 0, behind = 0;
    const Py_ssize_t count = PyList_Size(py_extents);
    for (Py_ssize_t i = 0; i < count; i++) {
        unsigned long long begin, end, target;
        if (!PyArg_ParseTuple(PyList_GetItem(py_extents, i), "KKK", &begin, &end, &target))
            return -1;
        if (begin < behind || end <= begin || end > size_bytes || target == 0) {
            PyErr_SetString(PyExc_ValueError, "no such bytes in the file, or out of order");
            return -1;
        }
        behind = end;
        sum_bytes += end - begin;
        extents[i] = (struct stx_extent){.begin_bytes = begin, .end_bytes = end, .target = target};
    }
    return (int64_t)sum_bytes;
}

/* The first tensor that is read, for what is said about a file that was cut. */
static size_t find_first(const struct stx_header *header, uint64_t begin_bytes) {
    size_t first = 0;
    while (first + 1 < header->tensors_count &&
           header->data_begin_bytes + header->tensors[first].end <= begin_bytes)
        first++;
    return first;
}

static void raise_failure(struct stx_py_handle *handle, enum stx_status status,
                          const struct stx_extent *extents, const struct stx_load_result *result,
                          const struct stx_err *err) {
    const size_t first = find_first(&handle->source.header, extents[0].begin_bytes);
    if (status == STX_OK)
        PyErr_SetNone(PyExc_KeyboardInterrupt);
    else if (status == STX_ERR_DEVICE)
        PyErr_SetString(PyExc_RuntimeError, err->message);
    else
        (void)stx_py_owned_raise(handle, &handle->file->file, first, result->failed_offset_bytes,
                                 err);
}

/* 0, or -1 with an exception. */
static int read_extents(struct stx_py_handle *handle, const struct stx_extent *extents,
                        size_t count, uint64_t sum_bytes, int index, uint64_t stream,
                        uint64_t staging_bytes, bool tells) {
    struct stx_py_state *const state = handle->state;
    const struct stx_device_ops *const ops = stx_device_cuda();
    const struct stx_owned_options options = stx_py_owned_options(handle);
    struct stx_load_result result = {.failed_file = STX_LOAD_NO_FILE};
    struct stx_py_patience patience = {.reporting = tells ? handle : NULL, .result = &result};
    const struct stx_owned_patience core_patience = {.keep_going = stx_py_patience_ask,
                                                     .context = &patience};
    struct stx_transfer transfer = {.file = &handle->file->file,
                                    .extents = extents,
                                    .extents_count = count,
                                    .stream = (void *)(uintptr_t)stream,
                                    .options = &options,
                                    .patience = &core_patience};
    struct stx_owned_way way = {.why_buffered = NULL};
    struct stx_err err = {.status = STX_OK};
    if (ops == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "torch has no device runtime in this process");
        return -1;
    }
    const uint64_t start_ns = stx_py_clock_ns();
    patience.thread = PyEval_SaveThread();
    enum stx_status status = stx_staging_get(&transfer.staging, ops, index, staging_bytes, &err);
    if (status == STX_OK) status = stx_transfer_run(&transfer, &result, &way, &err);
    PyEval_RestoreThread(patience.thread);
    state->counters.read_ns += stx_py_clock_ns() - start_ns;
    stx_py_owned_count(handle, &result, sum_bytes, &way);
    if (status == STX_OK && !result.cancelled) {
        state->counters.bytes_wanted += sum_bytes;
        state->counters.bytes_to_device += sum_bytes;
        if (!stx_staging_is_pinned(transfer.staging)) state->counters.loads_pageable++;
        if (!tells || (stx_py_progress_report(handle, handle->kept_bytes) == 0 &&
                       stx_py_progress_stop(handle) == 0))
            return 0;
    }
    if (!PyErr_Occurred()) raise_failure(handle, status, extents, &result, &err);
    if (tells) stx_py_progress_drop(handle);
    return -1;
}

PyObject *stx_py_device_read(PyObject *py_module, PyObject *py_arguments) {
    struct stx_py_state *const state = PyModule_GetState(py_module);
    PyObject *py_handle, *py_extents;
    unsigned long long stream, staging_bytes, tensors_count;
    int index, tells;
    if (!PyArg_ParseTuple(py_arguments, "O!OiKKKp:device_read", state->handle_type, &py_handle,
                          &py_extents, &index, &stream, &staging_bytes, &tensors_count, &tells))
        return NULL;
    struct stx_py_handle *const handle = (struct stx_py_handle *)py_handle;
    if (handle->closed) return stx_py_raise_closed(state);
    if (handle->file == NULL || !PyList_Check(py_extents))
        return PyErr_Format(PyExc_TypeError, "a handle that reads, and a list");
    const size_t count = (size_t)PyList_Size(py_extents);
    struct stx_extent *extents = PyMem_Calloc(count + 1, sizeof *extents);
    if (extents == NULL) return PyErr_NoMemory();
    const uint64_t begin_ns = stx_trace_begin();
    handle->busy++; /* the descriptor stays open */
    const int64_t sum_bytes = take_extents(handle, py_extents, extents);
    int result = sum_bytes < 0 ? -1 : 0;
    if (result == 0 && count != 0)
        result = read_extents(handle, extents, count, (uint64_t)sum_bytes, index, stream,
                              staging_bytes, tells);
    if (result == 0) state->counters.tensors_native += tensors_count;
    STX_TRACE(STX_TRACE_LOAD, begin_ns, handle->file->file.label, "device", tensors_count,
              sum_bytes < 0 ? 0 : (uint64_t)sum_bytes, result != 0);
    stx_py_handle_leave(handle);
    PyMem_Free(extents);
    return result == 0 ? Py_NewRef(Py_None) : NULL;
}

PyObject *stx_py_device_runtime(PyObject *py_module, PyObject *py_unused) {
    (void)py_module, (void)py_unused;
    return PyBool_FromLong(stx_device_cuda() != NULL);
}

PyObject *stx_py_device_bind(PyObject *py_module, PyObject *py_path) {
    struct stx_err err;
    const char *path = PyUnicode_AsUTF8AndSize(py_path, NULL);
    (void)py_module;
    if (path == NULL) return NULL;
    if (stx_device_cuda_bind(path, &err) == STX_OK) return Py_NewRef(Py_None);
    return PyErr_Format(PyExc_OSError, "%s", err.message);
}
