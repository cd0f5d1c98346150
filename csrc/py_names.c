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
