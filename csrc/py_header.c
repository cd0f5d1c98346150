/* SPDX-License-Identifier: Apache-2.0
 *
 * Turns the core's table of a file into Python's values, all at once: whoever copies a model or
 * shows it asks for every tensor, and a call for each would cost more than the header itself.
 */
#include "py_header.h"

#include <fcntl.h>
#include <unistd.h>

#include "py_filter.h"
#include "py_handle.h"
#include "py_tensor.h"

static PyObject *make_entry(struct stx_py_names *names, size_t index) {
    const struct stx_header *const header = names->header;
    const struct stx_tensor *const tensor = &header->tensors[index];
    PyObject *py_name = stx_py_names_get(names, index);
    if (py_name == NULL) return NULL;
    PyObject *py_shape = stx_py_tensor_shape(tensor);
    if (py_shape == NULL) return NULL;
    const unsigned long long begin = header->data_begin_bytes + tensor->begin;
    const unsigned long long end = header->data_begin_bytes + tensor->end;
    return Py_BuildValue("(OsNKK)", py_name, stx_dtype_info(tensor->dtype)->name, py_shape, begin,
                         end);
}

static PyObject *list_entries(struct stx_py_names *names) {
    const size_t count = names->header->tensors_count;
    PyObject *py_entries = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; py_entries != NULL && i < count; i++) {
        PyObject *py_entry = make_entry(names, i);
        if (py_entry == NULL)
            Py_CLEAR(py_entries);
        else
            (void)PyList_SetItem(py_entries, (Py_ssize_t)i, py_entry);
    }
    return py_entries;
}

/* Which entries the rule keeps, as bytes. */
static PyObject *filter_entries(struct stx_py_state *state, PyObject *py_rule, PyObject *py_path,
                                struct stx_py_names *names) {
    const size_t count = names->header->tensors_count;
    if (py_rule == Py_None) return Py_NewRef(Py_None);
    uint8_t *keep = PyMem_Calloc(count + 1, 1);
    PyObject *py_keep = NULL;
    if (keep == NULL) return PyErr_NoMemory();
    if (stx_py_filter_run(state, py_rule, py_path, names, keep, NULL) == 0)
        py_keep = PyBytes_FromStringAndSize((const char *)keep, (Py_ssize_t)count);
    PyMem_Free(keep);
    return py_keep;
}

static PyObject *make_result(struct stx_py_state *state, const struct stx_source *source,
                             PyObject *py_rule, PyObject *py_path) {
    const struct stx_file_identity *const identity = &source->file.identity;
    struct stx_py_names names = {0};
    PyObject *py_keep = NULL, *py_entries = NULL, *py_metadata = NULL, *py_result = NULL;
    int fd = -1;
    if (stx_py_names_init(&names, &source->header) != 0) goto out;
    py_keep = filter_entries(state, py_rule, py_path, &names);
    if (py_keep == NULL || (py_entries = list_entries(&names)) == NULL) goto out;
    py_metadata = stx_py_names_metadata(&source->header);
    if (py_metadata == NULL) goto out;
    fd = fcntl(source->file.fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0) {
        (void)PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, py_path);
        goto out;
    }
    py_result =
        Py_BuildValue("(i(KKKL)OOO)", fd, (unsigned long long)identity->device,
                      (unsigned long long)identity->inode, (unsigned long long)identity->size_bytes,
                      (long long)identity->mtime_ns, py_metadata, py_entries, py_keep);
    if (py_result == NULL) (void)close(fd);
out:
    Py_XDECREF(py_keep);
    Py_XDECREF(py_entries);
    Py_XDECREF(py_metadata);
    stx_py_names_free(&names);
    return py_result;
}

PyObject *stx_py_header_read(PyObject *py_module, PyObject *py_arguments) {
    struct stx_py_state *const state = PyModule_GetState(py_module);
    struct stx_source source;
    PyObject *py_path, *py_rule;
    if (!PyArg_ParseTuple(py_arguments, "UO:read_header", &py_path, &py_rule)) return NULL;
    if (stx_py_source_read(state, &source, py_path, STX_SOURCE_FILE) != 0) return NULL;
    PyObject *py_result = make_result(state, &source, py_rule, py_path);
    stx_source_close(&source);
    return py_result;
}
