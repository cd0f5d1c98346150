/* SPDX-License-Identifier: Apache-2.0
 *
 * Loads from bytes. The bytes object is immutable and held by the caller's frame, so it may be
 * copied from without the GIL; the header is parsed from a copy of its own, because the parser
 * reads beyond the end.
 */
#include "py_bytes.h"

#include <string.h>

#include "checked.h"
#include "copy.h"
#include "json.h"
#include "memory.h"
#include "py_err.h"
#include "py_filter.h"
#include "py_modes.h"
#include "py_names.h"
#include "py_owned.h"
#include "py_tensor.h"
#include "trace.h"

/* Each tensor begins at a multiple of this, as torch's own do. */
#define ALIGN_BYTES 64

struct loading {
    const char *data;
    uint64_t data_bytes;
    struct stx_header header;
    struct stx_py_names names;
    uint8_t *keep;           /* NULL keeps all */
    struct stx_copy *copies; /* one per tensor, empty where it is left out */
    uint64_t *places;        /* in the arena, per tensor */
    struct stx_arena *arena;
};

static bool keeps(const struct loading *loading, size_t index) {
    return loading->keep == NULL || loading->keep[index] != 0;
}

/* Parse the header; 0, or -1 with Refused. */
static int parse(const struct stx_py_state *state, struct loading *loading) {
    struct stx_err err;
    uint64_t json_bytes = 0;
    char *text = NULL;
    enum stx_status status = STX_OK;
    if (loading->data_bytes < STX_HEADER_PREFIX_BYTES)
        status = stx_err_set(&err, STX_ERR_FORMAT, "no header");
    if (status == STX_OK)
        status = stx_header_length((const unsigned char *)loading->data, loading->data_bytes,
                                   &json_bytes, &err);
    if (status == STX_OK) {
        text = stx_memory_alloc((size_t)(json_bytes + STX_JSON_PADDING_BYTES));
        if (text == NULL) status = stx_err_set(&err, STX_ERR_MEMORY, "no memory for a header");
    }
    if (status == STX_OK) {
        memcpy(text, loading->data + STX_HEADER_PREFIX_BYTES, (size_t)json_bytes);
        memset(text + json_bytes, 0, STX_JSON_PADDING_BYTES);
        status = stx_header_parse(&loading->header, text, json_bytes, loading->data_bytes, &err);
    }
    free(text);
    if (status == STX_OK) return 0;
    (void)stx_py_raise_refused(state, &err);
    return -1;
}

static int filter(struct stx_py_state *state, struct loading *loading, PyObject *py_rule) {
    if (stx_py_names_init(&loading->names, &loading->header) != 0) return -1;
    if (py_rule == Py_None) return 0;
    loading->keep = PyMem_Calloc(loading->header.tensors_count + 1, 1);
    if (loading->keep == NULL) return PyErr_NoMemory(), -1;
    return stx_py_filter_run(state, py_rule, Py_None, &loading->names, loading->keep, NULL);
}

/* Where every kept tensor goes, and memory for all. 0, or -1 with an exception. */
static int place(const struct stx_py_state *state, struct loading *loading) {
    const struct stx_header *header = &loading->header;
    struct stx_err err;
    uint64_t at_bytes = 0;
    loading->copies = PyMem_Calloc(header->tensors_count + 1, sizeof *loading->copies);
    loading->places = PyMem_Calloc(header->tensors_count + 1, sizeof *loading->places);
    if (loading->copies == NULL || loading->places == NULL) return PyErr_NoMemory(), -1;
    for (size_t i = 0; i < header->tensors_count; i++) {
        const struct stx_tensor *tensor = &header->tensors[i];
        if (!keeps(loading, i)) continue;
        /* Stock looks dtypes up in a table of its own here, which lacks this one. */
        if (tensor->dtype == STX_DTYPE_F8_E8M0 || !stx_py_owned_is_native(tensor)) {
            (void)stx_err_set(&err, STX_ERR_UNSUPPORTED, "a tensor of another kind");
            (void)stx_py_raise_refused(state, &err);
            return -1;
        }
        loading->places[i] = at_bytes;
        loading->copies[i].source = loading->data + header->data_begin_bytes + tensor->begin;
        loading->copies[i].size_bytes = tensor->end - tensor->begin;
        at_bytes = stx_align_up(at_bytes + (tensor->end - tensor->begin), ALIGN_BYTES);
    }
    if (stx_arena_open(&loading->arena, at_bytes, &err) == STX_OK) return 0;
    PyErr_SetString(PyExc_MemoryError, err.message);
    return -1;
}

static void copy(struct loading *loading) {
    char *const bytes = stx_arena_bytes(loading->arena);
    Py_BEGIN_ALLOW_THREADS;
    for (size_t i = 0; i < loading->header.tensors_count; i++)
        loading->copies[i].target = bytes + loading->places[i];
    stx_copy_run(loading->copies, loading->header.tensors_count);
    Py_END_ALLOW_THREADS;
}

static PyObject *hand_out(struct stx_py_state *state, struct loading *loading) {
    PyObject *py_tensors = PyDict_New();
    const int paused = stx_py_torch_pause_collections(state);
    for (size_t i = 0; py_tensors != NULL && i < loading->header.tensors_count; i++) {
        if (!keeps(loading, i)) continue;
        PyObject *py_name = stx_py_names_get(&loading->names, i);
        PyObject *py_tensor =
            py_name == NULL ? NULL
                            : stx_py_tensor_make_owned(state, loading->arena, loading->places[i],
                                                       &loading->header.tensors[i]);
        if (py_tensor == NULL || PyDict_SetItem(py_tensors, py_name, py_tensor) != 0)
            Py_CLEAR(py_tensors);
        Py_XDECREF(py_tensor);
    }
    if (paused) (void)PyGC_Enable();
    return py_tensors;
}

PyObject *stx_py_bytes_load(PyObject *py_module, PyObject *py_arguments) {
    struct stx_py_state *state = PyModule_GetState(py_module);
    struct loading loading = {.data = NULL};
    PyObject *py_data, *py_rule, *py_tensors = NULL;
    char *data = NULL;
    Py_ssize_t data_bytes = 0;
    if (!PyArg_ParseTuple(py_arguments, "SO:load_bytes", &py_data, &py_rule)) return NULL;
    if (stx_py_err_load(state) != 0 || stx_py_torch_load(state) != 0) return NULL;
    if (PyBytes_AsStringAndSize(py_data, &data, &data_bytes) != 0) return NULL;
    const uint64_t begin_ns = stx_trace_begin();
    loading.data = data;
    loading.data_bytes = (uint64_t)data_bytes;
    if (parse(state, &loading) == 0 && filter(state, &loading, py_rule) == 0 &&
        place(state, &loading) == 0) {
        copy(&loading);
        py_tensors = hand_out(state, &loading);
    }
    STX_TRACE(STX_TRACE_LOAD, begin_ns, 0, "bytes", loading.header.tensors_count,
              loading.data_bytes, py_tensors == NULL);
    stx_arena_release(loading.arena);
    PyMem_Free(loading.copies);
    PyMem_Free(loading.places);
    PyMem_Free(loading.keep);
    stx_py_names_free(&loading.names);
    stx_header_free(&loading.header);
    return py_tensors;
}
