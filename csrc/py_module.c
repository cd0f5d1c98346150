/* SPDX-License-Identifier: Apache-2.0
 *
 * The module stx_patch._C: a table of contents. Functions and types live in the files named beside
 * them; here they are only listed, and the module's state is made and torn down.
 */
#include <Python.h>
#include <time.h>

#include "engine.h"
#include "py_bytes.h"
#include "py_device.h"
#include "py_filter.h"
#include "py_handle.h"
#include "py_header.h"
#include "py_keeps.h"
#include "py_overlap.h"
#include "py_plan.h"
#include "py_read.h"
#include "py_tensor.h"
#include "py_trace.h"
#include "readahead.h"

uint64_t stx_py_clock_ns(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Fields of struct stx_py_counters, in its order, as Python sees them. */
static const char *const counter_names[] = {
    "opens",        "headers_reused", "tensors_native", "keys_kept",       "keys_skipped",
    "bytes_kept",   "bytes_skipped",  "bytes_wanted",   "bytes_read",      "bytes_over_read",
    "requests",     "files_cold",     "files_warm",     "files_unknown",   "retries",
    "loads_direct", "loads_buffered", "loads_pageable", "bytes_to_device", "header_ns",
    "filter_ns",    "plan_ns",        "read_ns",        "wrap_ns"};
#define COUNTERS_COUNT (sizeof counter_names / sizeof counter_names[0])
_Static_assert(sizeof(struct stx_py_counters) == COUNTERS_COUNT * sizeof(uint64_t),
               "a name for each counter");

static PyObject *module_counters(PyObject *py_module, PyObject *py_unused) {
    const struct stx_py_state *state = PyModule_GetState(py_module);
    const struct stx_readahead_sums sums = stx_readahead_count();
    struct stx_py_counters counters = state->counters;
    const uint64_t *values = (const uint64_t *)&counters;
    PyObject *py_counters = PyDict_New();
    (void)py_unused;
    counters.requests += sums.requests;
    counters.bytes_read += sums.bytes;
    counters.bytes_over_read += sums.over_bytes;
    for (size_t i = 0; py_counters != NULL && i < COUNTERS_COUNT; i++) {
        PyObject *py_value = PyLong_FromUnsignedLongLong(values[i]);
        if (py_value == NULL || PyDict_SetItemString(py_counters, counter_names[i], py_value) != 0)
            Py_CLEAR(py_counters);
        Py_XDECREF(py_value);
    }
    return py_counters;
}

static PyObject *module_engine(PyObject *py_module, PyObject *py_unused) {
    const struct stx_py_state *state = PyModule_GetState(py_module);
    (void)py_unused;
    return Py_BuildValue("(zzz)", state->engine, stx_engine_refusal(), state->why_buffered);
}

/* Whether an engine of a kind can be had: opened and closed. */
static PyObject *module_probe(PyObject *py_module, PyObject *py_kind) {
    struct stx_engine engine;
    struct stx_engine_options options = {.depth = 1};
    struct stx_err err;
    const long kind = PyLong_AsLong(py_kind);
    (void)py_module;
    if (PyErr_Occurred()) return NULL;
    options.kind = kind == STX_ENGINE_THREADS ? STX_ENGINE_THREADS : STX_ENGINE_AUTO;
    if (stx_engine_open(&engine, &options, &err) != STX_OK)
        return PyErr_Format(PyExc_OSError, "%s", err.message);
    const char *const name = engine.ops->name;
    stx_engine_close(&engine);
    return PyUnicode_FromString(name);
}

/* For tests and benchmarks: the helpers run on when a load has returned. */
static PyObject *module_settle(PyObject *py_module, PyObject *py_timeout_ms) {
    bool settled;
    const unsigned long timeout_ms = PyLong_AsUnsignedLong(py_timeout_ms);
    (void)py_module;
    if (PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS;
    settled = stx_readahead_settle((uint32_t)timeout_ms);
    Py_END_ALLOW_THREADS;
    return PyBool_FromLong(settled);
}

static PyMethodDef module_methods[] = {
    /* py_open.c */
    {"open", stx_py_handle_open, METH_VARARGS,
     PyDoc_STR("open(path, rule, origin, options, reads) -> handle; raises Refused")},
    /* py_plan.c */
    {"explain", stx_py_plan_explain, METH_VARARGS,
     PyDoc_STR("explain(path, rule, reads) -> dict; raises Refused")},
    /* py_header.c */
    {"read_header", stx_py_header_read, METH_VARARGS,
     PyDoc_STR(
         "read_header(path, rule) -> (fd, identity, metadata, entries, keep); raises Refused")},
    /* py_bytes.c */
    {"load_bytes", stx_py_bytes_load, METH_VARARGS,
     PyDoc_STR("load_bytes(data, rule) -> dict; raises Refused")},
    /* py_filter.c */
    {"match_rule", stx_py_filter_match, METH_VARARGS, PyDoc_STR("match_rule(rule, name) -> bool")},
    /* py_device.c */
    {"device_read", stx_py_device_read, METH_VARARGS,
     PyDoc_STR(
         "device_read(handle, extents, device, stream, staging_bytes, tensors_count, tells)")},
    {"device_place", stx_py_device_place, METH_VARARGS,
     PyDoc_STR("device_place(handle, name) -> (dtype, shape, begin, end)")},
    {"device_runtime", stx_py_device_runtime, METH_NOARGS, PyDoc_STR("device_runtime() -> bool")},
    {"device_bind", stx_py_device_bind, METH_O, PyDoc_STR("device_bind(path): for tests")},
    /* py_read.c */
    {"read_into", stx_py_read_into, METH_VARARGS,
     PyDoc_STR("read_into(path, offset, size_bytes, address, device, stream, staging_bytes)")},
    /* py_overlap.c */
    {"names_overlap", stx_py_names_overlap, METH_O,
     PyDoc_STR("names_overlap(handles) -> bool: two of them have a name in common, or may have")},
    /* py_trace.c */
    {"trace_start", stx_py_trace_start, METH_NOARGS, PyDoc_STR("trace_start(): begin to record")},
    {"trace_stop", stx_py_trace_stop, METH_NOARGS,
     PyDoc_STR("trace_stop(): end, and forget what was recorded")},
    {"trace_count", stx_py_trace_count, METH_NOARGS,
     PyDoc_STR("trace_count() -> how many records there have been")},
    {"trace_events", stx_py_trace_events, METH_O,
     PyDoc_STR("trace_events(first) -> (list of (name, shape, begin_ns, end_ns, thread, "
               "arguments), lost)")},
    {"trace_fallback", stx_py_trace_fallback, METH_O,
     PyDoc_STR("trace_fallback(reason): a call was handed to stock")},
    /* here */
    {"counters", module_counters, METH_NOARGS, PyDoc_STR("counters() -> dict[str, int]")},
    {"engine", module_engine, METH_NOARGS,
     PyDoc_STR("engine() -> (last one used, why not io_uring, why not direct), None each")},
    {"probe_engine", module_probe, METH_O,
     PyDoc_STR("probe_engine(kind) -> the name of the engine that reads would use")},
    {"settle", module_settle, METH_O,
     PyDoc_STR("settle(timeout_ms) -> bool: wait until nothing is read ahead")},
    {NULL, NULL, 0, NULL}};

static int module_exec(PyObject *py_module) {
    struct stx_py_state *state = PyModule_GetState(py_module);
    state->handle_type =
        (PyTypeObject *)PyType_FromModuleAndSpec(py_module, &stx_py_handle_spec, NULL);
    state->slice_type =
        (PyTypeObject *)PyType_FromModuleAndSpec(py_module, &stx_py_slice_spec, NULL);
    state->stream_type =
        (PyTypeObject *)PyType_FromModuleAndSpec(py_module, &stx_py_stream_spec, NULL);
    state->refused = PyErr_NewExceptionWithDoc(
        "stx_patch._C.Refused", "(kind, text, position): this file is stock's to serve.", NULL,
        NULL);
    if (state->handle_type == NULL || state->slice_type == NULL || state->stream_type == NULL ||
        state->refused == NULL ||
        PyModule_AddObjectRef(py_module, "Handle", (PyObject *)state->handle_type) != 0 ||
        PyModule_AddObjectRef(py_module, "Slice", (PyObject *)state->slice_type) != 0 ||
        PyModule_AddObjectRef(py_module, "Refused", state->refused) != 0)
        return -1;
    return 0;
}

static int module_traverse(PyObject *py_module, visitproc visit, void *arg) {
    const struct stx_py_state *state = PyModule_GetState(py_module);
    Py_VISIT(state->handle_type);
    Py_VISIT(state->slice_type);
    Py_VISIT(state->stream_type);
    Py_VISIT(state->refused);
    Py_VISIT(state->safetensors_error);
    Py_VISIT(state->tensor_key);
    Py_VISIT(state->torch.module);
    for (size_t i = 0; i < STX_PY_KEEPS_MAX; i++) Py_VISIT(state->keeps[i].py_rule);
    return 0;
}

static int module_clear(PyObject *py_module) {
    struct stx_py_state *state = PyModule_GetState(py_module);
    Py_CLEAR(state->handle_type);
    Py_CLEAR(state->slice_type);
    Py_CLEAR(state->stream_type);
    Py_CLEAR(state->refused);
    Py_CLEAR(state->safetensors_error);
    Py_CLEAR(state->tensor_key);
    stx_py_keeps_clear(state);
    stx_py_torch_clear(state);
    return 0;
}

static void module_free(void *module) { (void)module_clear(module); }

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};

static struct PyModuleDef module_def = {.m_base = PyModuleDef_HEAD_INIT,
                                        .m_name = "stx_patch._C",
                                        .m_doc = "The native core of stx_patch.",
                                        .m_size = sizeof(struct stx_py_state),
                                        .m_methods = module_methods,
                                        .m_slots = module_slots,
                                        .m_traverse = module_traverse,
                                        .m_clear = module_clear,
                                        .m_free = module_free};

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&module_def); }
