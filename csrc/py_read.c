/* SPDX-License-Identifier: Apache-2.0
 *
 * One extent of a transfer (transfer.h), for a device or for this process's own memory, by a ring
 * that lives as long as the call. What is small goes straight to where it belongs.
 */
#include "py_read.h"

#include <errno.h>

#include "py_patience.h"
#include "transfer.h"

#define SMALL_BYTES (UINT64_C(1) << 20)

static enum stx_status read_by_ring(const struct stx_file *file, const struct stx_extent *extent,
                                    int device, uint64_t stream, uint64_t staging_bytes,
                                    const struct stx_owned_patience *patience,
                                    struct stx_load_result *result, struct stx_err *err) {
    const struct stx_device host = {.ops = &stx_device_cpu};
    const struct stx_device_ops *const cuda = device < 0 ? NULL : stx_device_cuda();
    const struct stx_owned_options options = {.direct_io = STX_DIRECT_AUTO};
    struct stx_owned_way way;
    struct stx_transfer transfer = {.file = file,
                                    .extents = extent,
                                    .extents_count = 1,
                                    .stream = (void *)(uintptr_t)stream,
                                    .options = &options,
                                    .patience = patience};
    if (device >= 0 && cuda == NULL)
        return stx_err_set(err, STX_ERR_DEVICE, "torch has no device runtime in this process");
    if (device < 0)
        STX_TRY(stx_staging_open(&transfer.staging, &host, staging_bytes, err));
    else
        STX_TRY(stx_staging_get(&transfer.staging, cuda, device, staging_bytes, err));
    const enum stx_status status = stx_transfer_run(&transfer, result, &way, err);
    if (device < 0) stx_staging_close(transfer.staging);
    return status;
}

static enum stx_status read_file(const char *path, struct stx_extent *extent, uint64_t size_bytes,
                                 int device, uint64_t stream, uint64_t staging_bytes,
                                 const struct stx_owned_patience *patience,
                                 struct stx_load_result *result, struct stx_err *err) {
    struct stx_file file;
    STX_TRY(stx_file_open(&file, path, err));
    enum stx_status status = STX_OK;
    const uint64_t end_bytes = file.identity.size_bytes;
    if (extent->begin_bytes > end_bytes || size_bytes > end_bytes - extent->begin_bytes)
        status = stx_err_set(err, STX_ERR_IO, "the file ends at byte %llu",
                             (unsigned long long)end_bytes);
    extent->end_bytes = extent->begin_bytes + size_bytes;
    if (status == STX_OK && size_bytes != 0)
        status =
            device < 0 && size_bytes < SMALL_BYTES
                ? stx_file_read(&file, (void *)(uintptr_t)extent->target, size_bytes,
                                extent->begin_bytes, err)
                : read_by_ring(&file, extent, device, stream, staging_bytes, patience, result, err);
    stx_file_close(&file);
    return status;
}

static PyObject *raise_failure(PyObject *py_path, const struct stx_err *err) {
    if (err->status == STX_ERR_DEVICE) return PyErr_Format(PyExc_RuntimeError, "%s", err->message);
    if (err->status == STX_ERR_MEMORY)
        return PyErr_Format(PyExc_MemoryError, "%U: %s", py_path, err->message);
    if (err->sys_errno == 0) return PyErr_Format(PyExc_OSError, "%U: %s", py_path, err->message);
    errno = err->sys_errno;
    return PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, py_path);
}

PyObject *stx_py_read_into(PyObject *py_module, PyObject *py_arguments) {
    PyObject *py_path;
    unsigned long long offset, size_bytes, address, stream, staging_bytes;
    int device;
    struct stx_load_result result = {.failed_file = STX_LOAD_NO_FILE};
    struct stx_py_patience patience = {.result = &result};
    const struct stx_owned_patience core_patience = {.keep_going = stx_py_patience_ask,
                                                     .context = &patience};
    struct stx_err err;
    (void)py_module;
    if (!PyArg_ParseTuple(py_arguments, "UKKKiKK:read_into", &py_path, &offset, &size_bytes,
                          &address, &device, &stream, &staging_bytes))
        return NULL;
    const char *path = PyUnicode_AsUTF8AndSize(py_path, NULL);
    if (path == NULL) return NULL;
    struct stx_extent extent = {.begin_bytes = offset, .target = address};
    patience.thread = PyEval_SaveThread();
    const enum stx_status status = read_file(path, &extent, size_bytes, device, stream,
                                             staging_bytes, &core_patience, &result, &err);
    PyEval_RestoreThread(patience.thread);
    if (PyErr_Occurred()) return NULL;
    if (status != STX_OK) return raise_failure(py_path, &err);
    if (result.cancelled) {
        PyErr_SetNone(PyExc_KeyboardInterrupt);
        return NULL;
    }
    return Py_NewRef(Py_None);
}
