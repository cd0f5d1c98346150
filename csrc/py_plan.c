/* SPDX-License-Identifier: Apache-2.0
 *
 * Builds the plan of a file with the limits of a mapping, and tells one without running it.
 */
#include "py_plan.h"

#include "owned.h"
#include "py_filter.h"
#include "py_handle.h"
#include "py_tensor.h"
#include "residency.h"

/* Reads over a gap of at most a page cost nothing extra: the page is read anyway. */
#define GAP_BYTES 4096
#define ALIGN_BYTES 4096
#define BLOCK_BYTES ((uint64_t)8 << 20) /* what a helper of the read-ahead takes at a time */

static int build(struct stx_plan *plan, const struct stx_header *header, const uint8_t *keep,
                 const struct stx_plan_limits *limits) {
    const struct stx_plan_input input = {.header = header, .keep = keep};
    struct stx_err err;
    if (stx_plan_build(plan, &input, 1, limits, &err) == STX_OK) return 0;
    PyErr_NoMemory();
    return -1;
}

int stx_py_plan_build(struct stx_plan *plan, const struct stx_header *header, const uint8_t *keep) {
    const struct stx_plan_limits limits = {
        .gap_bytes = GAP_BYTES, .align_bytes = ALIGN_BYTES, .block_bytes = BLOCK_BYTES};
    return build(plan, header, keep, &limits);
}

struct stx_range *stx_py_plan_ranges(const struct stx_plan *plan) {
    struct stx_range *ranges = calloc(plan->reads_count + 1, sizeof *ranges);
    for (size_t i = 0; ranges != NULL && i < plan->reads_count; i++)
        ranges[i] = (struct stx_range){plan->reads[i].begin_bytes, plan->reads[i].end_bytes};
    return ranges;
}

/* An enum stx_residency: of what the plan reads. */
static uint64_t ask_residency(const struct stx_source *source, const struct stx_plan *plan) {
    struct stx_range *ranges = stx_py_plan_ranges(plan);
    if (ranges == NULL) return STX_RESIDENCY_UNKNOWN;
    const enum stx_residency residency =
        stx_residency_ask(source->mapping, ranges, plan->reads_count);
    free(ranges);
    return residency;
}

/* [(begin, end, tensors)], offsets in the file. */
static PyObject *list_spans(const struct stx_plan *plan) {
    PyObject *py_spans = PyList_New((Py_ssize_t)plan->spans_count);
    for (size_t i = 0; py_spans != NULL && i < plan->spans_count; i++) {
        const struct stx_span *span = &plan->spans[i];
        PyObject *py_span =
            Py_BuildValue("(KKk)", (unsigned long long)span->begin_bytes,
                          (unsigned long long)span->end_bytes, (unsigned long)span->tensor_count);
        if (py_span == NULL || PyList_SetItem(py_spans, (Py_ssize_t)i, py_span) != 0)
            Py_CLEAR(py_spans);
    }
    return py_spans;
}

/* Kept tensors that stock would have to make. */
static uint64_t count_foreign(const struct stx_header *header, const uint8_t *keep) {
    uint64_t count = 0;
    for (size_t i = 0; i < header->tensors_count; i++)
        if (keep == NULL || keep[i] != 0) count += !stx_py_tensor_is_native(&header->tensors[i]);
    return count;
}

/* A dict of what is known and planned. Steals `py_spans`. */
static PyObject *tell(const struct stx_source *source, const uint8_t *keep,
                      const struct stx_plan *plan, PyObject *py_spans) {
    const struct stx_header *header = &source->header;
    const struct {
        const char *name;
        uint64_t value;
    } facts[] = {{"file_bytes", header->file_size_bytes},
                 {"header_read_bytes", source->header_read_bytes},
                 {"header_reads", source->header_reads_count},
                 {"cached_bytes", source->cached_bytes},
                 {"data_bytes", header->file_size_bytes - header->data_begin_bytes},
                 {"tensors", header->tensors_count},
                 {"tensors_kept", plan->tensors_kept},
                 {"tensors_foreign", count_foreign(header, keep)},
                 {"bytes_kept", plan->bytes_kept},
                 {"bytes_read", plan->bytes_read},
                 {"reads", plan->reads_count},
                 {"residency", ask_residency(source, plan)}};
    PyObject *py_told = py_spans == NULL ? NULL : PyDict_New();
    if (py_told != NULL && PyDict_SetItemString(py_told, "spans", py_spans) != 0) Py_CLEAR(py_told);
    for (size_t i = 0; py_told != NULL && i < sizeof facts / sizeof facts[0]; i++) {
        PyObject *py_value = PyLong_FromUnsignedLongLong(facts[i].value);
        if (py_value == NULL || PyDict_SetItemString(py_told, facts[i].name, py_value) != 0)
            Py_CLEAR(py_told);
        Py_XDECREF(py_value);
    }
    Py_XDECREF(py_spans);
    return py_told;
}

static PyObject *filter_and_tell(struct stx_py_state *state, const struct stx_source *source,
                                 PyObject *py_rule, PyObject *py_path, bool reads) {
    const struct stx_plan_limits limits = stx_owned_limits(source->header.file_size_bytes);
    struct stx_py_names names = {0};
    struct stx_plan plan = {0};
    uint8_t *keep = NULL;
    PyObject *py_told = NULL;
    if (stx_py_names_init(&names, &source->header) != 0) goto out;
    if (py_rule != Py_None) {
        keep = PyMem_Calloc(source->header.tensors_count + 1, 1);
        if (keep == NULL) PyErr_NoMemory();
        if (keep == NULL || stx_py_filter_run(state, py_rule, py_path, &names, keep, NULL) != 0)
            goto out;
    }
    if ((reads ? build(&plan, &source->header, keep, &limits)
               : stx_py_plan_build(&plan, &source->header, keep)) == 0)
        py_told = tell(source, keep, &plan, list_spans(&plan));
out:
    stx_plan_free(&plan);
    PyMem_Free(keep);
    stx_py_names_free(&names);
    return py_told;
}

PyObject *stx_py_plan_explain(PyObject *py_module, PyObject *py_arguments) {
    struct stx_py_state *state = PyModule_GetState(py_module);
    struct stx_source source;
    PyObject *py_path, *py_rule;
    int reads;
    if (!PyArg_ParseTuple(py_arguments, "UOp:explain", &py_path, &py_rule, &reads)) return NULL;
    if (stx_py_source_open(state, &source, py_path, STX_SOURCE_ASKED) != 0) return NULL;
    PyObject *py_told = filter_and_tell(state, &source, py_rule, py_path, reads != 0);
    stx_source_close(&source);
    return py_told;
}
