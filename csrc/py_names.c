/* SPDX-License-Identifier: Apache-2.0
 *
 * Lazily made strings. A program that asks one tensor of 100,000 pays for one string.
 */
#include "py_names.h"

int stx_py_names_init(struct stx_py_names *names, const struct stx_header *header) {
    names->header = header;
    names->items = PyMem_Calloc(header->tensors_count + 1, sizeof *names->items);
    if (names->items != NULL) return 0;
    PyErr_NoMemory();
    return -1;
}

PyObject *stx_py_names_get(struct stx_py_names *names, size_t index) {
    if (names->items[index] == NULL) {
        const struct stx_tensor *tensor = &names->header->tensors[index];
        names->items[index] =
            PyUnicode_FromStringAndSize(tensor->name, (Py_ssize_t)tensor->name_bytes);
    }
    return names->items[index];
}

void stx_py_names_free(struct stx_py_names *names) {
    if (names->items == NULL) return;
    for (size_t i = 0; i < names->header->tensors_count; i++) Py_XDECREF(names->items[i]);
    PyMem_Free(names->items);
    *names = (struct stx_py_names){0};
}

PyObject *stx_py_names_metadata(const struct stx_header *header) {
    if (!header->has_metadata) return Py_NewRef(Py_None);
    PyObject *py_metadata = PyDict_New();
    for (size_t i = 0; py_metadata != NULL && i < header->metadata_count; i++) {
        const struct stx_metadata_pair *pair = &header->metadata[i];
        PyObject *py_key = PyUnicode_FromStringAndSize(pair->key, pair->key_bytes);
        PyObject *py_value = PyUnicode_FromStringAndSize(pair->value, pair->value_bytes);
        if (py_key == NULL || py_value == NULL ||
            PyDict_SetItem(py_metadata, py_key, py_value) != 0)
            Py_CLEAR(py_metadata);
        Py_XDECREF(py_key);
        Py_XDECREF(py_value);
    }
    return py_metadata;
}
