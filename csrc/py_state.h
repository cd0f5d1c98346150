/* SPDX-License-Identifier: Apache-2.0
 *
 * The module's state: types, what was looked up in torch and safetensors, counters.
 *
 * One per module object, no static Python objects. Handles and slices keep a borrowed pointer to
 * it; their type keeps the module alive. All fields are read and written with the GIL held.
 */
#ifndef STX_PY_STATE_H
#define STX_PY_STATE_H

#include <Python.h>
#include <stdint.h>

#include "dtype.h"

/* How a tensor of a dtype is made with the torch that is installed. */
enum stx_py_route {
    STX_ROUTE_UNKNOWN = 0, /* not asked yet */
    STX_ROUTE_DIRECT,      /* torch takes the DLPack dtype */
    STX_ROUTE_VIEW,        /* as uint8, then .view(dtype) */
};

/* What is needed of torch. Filled by stx_py_torch_load on the first open. */
struct stx_py_torch {
    PyObject *module;               /* NULL until loaded */
    PyObject *from_dlpack;          /* torch._C._from_dlpack */
    const void *exchange;           /* DLPackExchangeAPI of torch >= 2.10, else NULL */
    PyObject *dispatch_stack_depth; /* torch._C._len_torch_dispatch_stack, or NULL */
    PyObject *function_stack_depth; /* torch._C._len_torch_function_stack, or NULL */
    PyObject *dtypes[STX_DTYPE_COUNT];
    enum stx_py_route routes[STX_DTYPE_COUNT];
};

/* Monotonic sums since import or the last reset. Bytes and nanoseconds. */
struct stx_py_counters {
    uint64_t opens;
    uint64_t headers_reused;
    uint64_t tensors_native;
    uint64_t keys_kept;
    uint64_t keys_skipped;
    uint64_t bytes_kept;
    uint64_t bytes_skipped;
    uint64_t bytes_wanted;
    uint64_t bytes_read;
    uint64_t bytes_over_read;
    uint64_t requests;
    uint64_t files_cold;
    uint64_t files_warm;
    uint64_t files_unknown;
    uint64_t retries;
    uint64_t loads_direct;
    uint64_t loads_buffered;
    uint64_t loads_pageable;
    uint64_t bytes_to_device;
    uint64_t header_ns;
    uint64_t filter_ns;
    uint64_t plan_ns;
    uint64_t read_ns;
    uint64_t wrap_ns;
};

/* A decision of a filter about a header (py_keeps.h). */
struct stx_py_keep {
    uint64_t header_number; /* 0: nothing is here */
    PyObject *py_rule;      /* owned */
    uint8_t *keep;          /* owned: a flag for each tensor */
    size_t count;
};
#define STX_PY_KEEPS_MAX 16

struct stx_py_state {
    PyTypeObject *handle_type;
    PyTypeObject *slice_type;
    PyTypeObject *stream_type;
    PyObject *refused;           /* _C.Refused: this file is stock's */
    PyObject *safetensors_error; /* safetensors.SafetensorError; NULL until the first open */
    PyObject *tensor_key;        /* stx_patch._filter.TensorKey; NULL until a callable filter */
    struct stx_py_torch torch;
    struct stx_py_counters counters;
    struct stx_py_keep keeps[STX_PY_KEEPS_MAX];
    size_t keeps_next;        /* the oldest */
    const char *engine;       /* of the last load that needed one; static, NULL at first */
    const char *why_buffered; /* why that load was not direct; static, NULL if it was */
};

/* Type specs, each defined in the file of its type. */
extern PyType_Spec stx_py_handle_spec;
extern PyType_Spec stx_py_slice_spec;
extern PyType_Spec stx_py_stream_spec;

/* Nanoseconds of the monotonic clock, for the phase counters. */
uint64_t stx_py_clock_ns(void);

#endif
