/* SPDX-License-Identifier: Apache-2.0
 *
 * Makes torch tensors through DLPack.
 *
 * DESIGN. torch >= 2.10 publishes a table of C functions (the DLPack exchange API): one call turns
 * a managed tensor into a torch.Tensor without touching the interpreter. Older torch takes the same
 * thing in a capsule. Both end in a storage made over our pointer with our deleter: exactly the
 * storage a user expects. Which DLPack dtypes the installed torch takes is asked once per dtype,
 * with one element; what it refuses is made as uint8 and viewed (only 1-byte types are ever
 * refused, so the shape is the same).
 *
 * The deleter runs once, in whatever thread drops the last reference, with or without the GIL,
 * perhaps while the interpreter exits: it touches the mapping's counter and free(), nothing else.
 */
#include "py_tensor.h"

#include <stdlib.h>
#include <string.h>

#include <ATen/dlpack.h>

#include "checked.h"

/* torch keeps sizes in small vectors and has no limit of its own, but nothing has ever needed
 * more; whoever does goes to stock. */
#define RANK_MAX 64

/* c10::InefficientStdFunctionContext: a pointer and a std::function. */
#define TORCH_CONTEXT_BYTES 40

#if defined(DLPACK_MAJOR_VERSION) && \
    (DLPACK_MAJOR_VERSION > 1 || (DLPACK_MAJOR_VERSION == 1 && DLPACK_MINOR_VERSION >= 3))
#define HAVE_EXCHANGE_API 1
#endif

/* What a tensor's bytes belong to: a mapping, or a part of an arena; neither for no bytes. */
struct memory {
    struct stx_mapping *mapping;
    struct stx_arena *arena;
    uint64_t begin_bytes; /* in the arena */
    uint64_t size_bytes;
    void *data;
};

/* One tensor's claim on its memory, freed by the deleter. The versioned and the legacy form share
 * it; which one is in use follows from how it was handed over. */
struct claim {
    union {
#if defined(HAVE_EXCHANGE_API)
        DLManagedTensorVersioned versioned;
#endif
        DLManagedTensor legacy;
    } managed;
    struct memory memory;
    int64_t extents[]; /* shape, then strides */
};

static void free_claim(struct claim *claim) {
    const struct memory *memory = &claim->memory;
    if (memory->arena != NULL)
        stx_arena_give_back(memory->arena, memory->begin_bytes,
                            memory->begin_bytes + memory->size_bytes);
    stx_arena_release(memory->arena);
    stx_mapping_release(memory->mapping);
    free(claim);
}

static void delete_legacy(DLManagedTensor *self) { free_claim(self->manager_ctx); }

/* DLPack's codes; those newer than the oldest header we build with are given by number. */
static DLDataType dlpack_dtype(enum stx_dtype dtype) {
    const uint8_t bits = stx_dtype_info(dtype)->bits;
    uint8_t code = kDLUInt;
    uint16_t lanes = 1;
    switch (dtype) {
        case STX_DTYPE_I8:
        case STX_DTYPE_I16:
        case STX_DTYPE_I32:
        case STX_DTYPE_I64:
            code = kDLInt;
            break;
        case STX_DTYPE_F16:
        case STX_DTYPE_F32:
        case STX_DTYPE_F64:
            code = kDLFloat;
            break;
        case STX_DTYPE_BF16:
            code = kDLBfloat;
            break;
        case STX_DTYPE_C64:
            code = kDLComplex;
            break;
        case STX_DTYPE_BOOL:
            code = kDLBool;
            break;
        case STX_DTYPE_F8_E4M3:
            code = 10; /* kDLFloat8_e4m3fn */
            break;
        case STX_DTYPE_F8_E4M3FNUZ:
            code = 11; /* kDLFloat8_e4m3fnuz */
            break;
        case STX_DTYPE_F8_E5M2:
            code = 12; /* kDLFloat8_e5m2 */
            break;
        case STX_DTYPE_F8_E5M2FNUZ:
            code = 13; /* kDLFloat8_e5m2fnuz */
            break;
        case STX_DTYPE_F8_E8M0:
            code = 14; /* kDLFloat8_e8m0fnu */
            break;
        case STX_DTYPE_F4:
            code = 17; /* kDLFloat4_e2m1fn; torch's dtype holds two */
            lanes = 2;
            break;
        default:
            break; /* unsigned */
    }
    return (DLDataType){.code = code, .bits = bits, .lanes = lanes};
}

#if defined(HAVE_EXCHANGE_API)

static void delete_versioned(DLManagedTensorVersioned *self) { free_claim(self->manager_ctx); }

static PyObject *hand_over_versioned(const struct stx_py_state *state, struct claim *claim,
                                     const DLTensor *view) {
    const DLPackExchangeAPI *exchange = state->torch.exchange;
    void *py_tensor = NULL;
    claim->managed.versioned =
        (DLManagedTensorVersioned){.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION},
                                   .manager_ctx = claim,
                                   .deleter = delete_versioned,
                                   .dl_tensor = *view};
    /* The claim is moved: torch calls the deleter, also when it fails after taking it. */
    if (exchange->managed_tensor_to_py_object_no_sync(&claim->managed.versioned, &py_tensor) != 0)
        return NULL;
    return py_tensor;
}

/* torch's table, if it is of a major version whose layout we know. */
static const void *find_exchange(PyObject *py_torch) {
    const DLPackExchangeAPI *exchange = NULL;
    PyObject *py_type = PyObject_GetAttrString(py_torch, "Tensor");
    PyObject *py_capsule =
        py_type == NULL ? NULL : PyObject_GetAttrString(py_type, "__dlpack_c_exchange_api__");
    if (py_capsule != NULL && PyCapsule_IsValid(py_capsule, "dlpack_exchange_api"))
        exchange = PyCapsule_GetPointer(py_capsule, "dlpack_exchange_api");
    PyErr_Clear(); /* older torch has no such attribute */
    Py_XDECREF(py_capsule);
    Py_XDECREF(py_type);
    if (exchange == NULL || exchange->header.version.major != DLPACK_MAJOR_VERSION) return NULL;
    return exchange;
}

#else

static PyObject *hand_over_versioned(const struct stx_py_state *state, struct claim *claim,
                                     const DLTensor *view) {
    (void)state, (void)claim, (void)view;
    return NULL; /* unreachable: the table is never found */
}

static const void *find_exchange(PyObject *py_torch) {
    (void)py_torch;
    return NULL;
}

#endif

/* A capsule that torch did not consume still owns its claim. */
static void destroy_capsule(PyObject *py_capsule) {
    if (!PyCapsule_IsValid(py_capsule, "dltensor")) return;
    DLManagedTensor *managed = PyCapsule_GetPointer(py_capsule, "dltensor");
    managed->deleter(managed);
}

static PyObject *hand_over_legacy(const struct stx_py_state *state, struct claim *claim,
                                  const DLTensor *view) {
    claim->managed.legacy =
        (DLManagedTensor){.dl_tensor = *view, .manager_ctx = claim, .deleter = delete_legacy};
    PyObject *py_capsule = PyCapsule_New(&claim->managed.legacy, "dltensor", destroy_capsule);
    if (py_capsule == NULL) {
        free_claim(claim);
        return NULL;
    }
    PyObject *py_tensor = PyObject_CallFunctionObjArgs(state->torch.from_dlpack, py_capsule, NULL);
    Py_DECREF(py_capsule);
    return py_tensor;
}

/* Fill shape and contiguous strides (an empty dimension counts as one in a stride, as torch does).
 * `halved`: the last dimension holds two values per element. */
static void fill_extents(int64_t *extents, const struct stx_tensor *tensor, bool halved) {
    int64_t *const strides = extents + tensor->rank;
    int64_t stride = 1;
    for (uint32_t i = tensor->rank; i-- > 0;) {
        extents[i] = (int64_t)tensor->shape[i];
        if (halved && i + 1 == tensor->rank) extents[i] /= 2;
        strides[i] = stride;
        if (extents[i] > 1) stride *= extents[i];
    }
}

/* Whether torch will find memory for the context of our deleter: it allocates that where nothing
 * may be thrown, so that running out of memory there ends the process (std::terminate()). What is
 * freed here is what the allocator hands out next for this size. */
static bool has_room_for_torch(void) {
    void *volatile context = malloc(TORCH_CONTEXT_BYTES); /* volatile: not to be optimised away */
    const bool has_room = context != NULL;
    free(context);
    return has_room;
}

static PyObject *make_with(const struct stx_py_state *state, const struct memory *memory,
                           const struct stx_tensor *tensor, DLDataType dtype, bool halved) {
    struct claim *claim =
        malloc(sizeof *claim + 2 * (size_t)tensor->rank * sizeof claim->extents[0]);
    if (claim == NULL || !has_room_for_torch()) {
        free(claim);
        return PyErr_NoMemory();
    }
    claim->memory = *memory;
    if (memory->mapping != NULL) stx_mapping_retain(memory->mapping);
    if (memory->arena != NULL) stx_arena_retain(memory->arena);
    fill_extents(claim->extents, tensor, halved);
    const DLTensor view = {.data = memory->data,
                           .device = {.device_type = kDLCPU, .device_id = 0},
                           .ndim = (int32_t)tensor->rank,
                           .dtype = dtype,
                           .shape = claim->extents,
                           .strides = claim->extents + tensor->rank,
                           .byte_offset = 0};
    if (state->torch.exchange != NULL) return hand_over_versioned(state, claim, &view);
    return hand_over_legacy(state, claim, &view);
}

static PyObject *make_viewed(const struct stx_py_state *state, const struct memory *memory,
                             const struct stx_tensor *tensor) {
    PyObject *py_bytes =
        make_with(state, memory, tensor, dlpack_dtype(STX_DTYPE_U8), tensor->dtype == STX_DTYPE_F4);
    if (py_bytes == NULL) return NULL;
    PyObject *py_tensor =
        PyObject_CallMethod(py_bytes, "view", "O", state->torch.dtypes[tensor->dtype]);
    Py_DECREF(py_bytes);
    return py_tensor;
}

/* Ask torch whether it takes this dtype, with one element of static memory. Only types of a byte or
 * less can be viewed; the wider ones every torch takes. What an interrupt or a function mode raises
 * meanwhile says nothing about the dtype: the question stays open. */
static int probe_route(struct stx_py_state *state, enum stx_dtype dtype) {
    static uint64_t element[2];
    const uint64_t shape[1] = {dtype == STX_DTYPE_F4 ? 2 : 1};
    const struct stx_tensor one = {.shape = shape, .rank = 1, .dtype = dtype};
    PyObject **const py_dtype = &state->torch.dtypes[dtype];
    if (*py_dtype == NULL)
        *py_dtype = PyObject_GetAttrString(state->torch.module, stx_dtype_info(dtype)->torch_name);
    if (*py_dtype == NULL) return -1; /* AttributeError, stock's own answer */
    if (stx_dtype_info(dtype)->bits > 8) {
        state->torch.routes[dtype] = STX_ROUTE_DIRECT;
        return 0;
    }
    const struct memory unclaimed = {.data = element};
    PyObject *py_probe =
        make_with(state, &unclaimed, &one, dlpack_dtype(dtype), dtype == STX_DTYPE_F4);
    PyObject *py_got = py_probe == NULL ? NULL : PyObject_GetAttrString(py_probe, "dtype");
    const bool refused = py_probe == NULL && (PyErr_ExceptionMatches(PyExc_RuntimeError) ||
                                              PyErr_ExceptionMatches(PyExc_BufferError));
    if (refused) PyErr_Clear();
    if (refused || py_got != NULL)
        state->torch.routes[dtype] = py_got == *py_dtype ? STX_ROUTE_DIRECT : STX_ROUTE_VIEW;
    Py_XDECREF(py_got);
    Py_XDECREF(py_probe);
    return state->torch.routes[dtype] == STX_ROUTE_UNKNOWN ? -1 : 0;
}

bool stx_py_tensor_is_native(const struct stx_tensor *tensor) {
    uint64_t extent = 1;
    if (stx_dtype_info(tensor->dtype)->torch_name == NULL || tensor->rank > RANK_MAX) return false;
    if (tensor->dtype == STX_DTYPE_F4 &&
        (tensor->rank == 0 || tensor->shape[tensor->rank - 1] % 2 != 0))
        return false;
    for (uint32_t i = 0; i < tensor->rank; i++)
        if (!stx_checked_mul(extent, stx_max_u64(tensor->shape[i], 1), &extent) ||
            extent > INT64_MAX)
            return false;
    return true;
}

static PyObject *make(struct stx_py_state *state, const struct memory *memory,
                      const struct stx_tensor *tensor) {
    const enum stx_dtype dtype = tensor->dtype;
    if (state->torch.routes[dtype] == STX_ROUTE_UNKNOWN && probe_route(state, dtype) != 0)
        return NULL;
    PyObject *py_tensor =
        state->torch.routes[dtype] == STX_ROUTE_DIRECT
            ? make_with(state, memory, tensor, dlpack_dtype(dtype), dtype == STX_DTYPE_F4)
            : make_viewed(state, memory, tensor);
    if (py_tensor == NULL) return NULL;
    state->counters.tensors_native++;
    state->counters.bytes_wanted += tensor->end - tensor->begin;
    return py_tensor;
}

/* An empty tensor has no address: a neighbour's would look like shared memory. */
static const struct memory no_memory = {.data = NULL};

PyObject *stx_py_tensor_make(struct stx_py_state *state, const struct stx_py_place *place,
                             const struct stx_tensor *tensor) {
    if (tensor->begin == tensor->end) return make(state, &no_memory, tensor);
    const struct memory memory = {
        .mapping = place->mapping,
        .data = stx_mapping_bytes(place->mapping) + place->data_begin_bytes + tensor->begin};
    return make(state, &memory, tensor);
}

PyObject *stx_py_tensor_shape(const struct stx_tensor *tensor) {
    PyObject *py_shape = PyList_New((Py_ssize_t)tensor->rank);
    if (py_shape == NULL) return NULL;
    for (uint32_t i = 0; i < tensor->rank; i++) {
        PyObject *py_extent = PyLong_FromUnsignedLongLong(tensor->shape[i]);
        if (py_extent == NULL || PyList_SetItem(py_shape, (Py_ssize_t)i, py_extent) != 0) {
            Py_DECREF(py_shape);
            return NULL;
        }
    }
    return py_shape;
}

/* torch.zeros(shape, dtype=dtype), which is what stock makes of no bytes that it reads: it follows
 * modes of torch that other tensors do not. */
static PyObject *make_zeros(struct stx_py_state *state, const struct stx_tensor *tensor) {
    if (state->torch.routes[tensor->dtype] == STX_ROUTE_UNKNOWN &&
        probe_route(state, tensor->dtype) != 0)
        return NULL;
    PyObject *py_zeros = PyObject_GetAttrString(state->torch.module, "zeros");
    PyObject *py_shape = stx_py_tensor_shape(tensor);
    PyObject *py_arguments = py_shape == NULL ? NULL : Py_BuildValue("(O)", py_shape);
    PyObject *py_keywords = Py_BuildValue("{s:O}", "dtype", state->torch.dtypes[tensor->dtype]);
    PyObject *py_tensor = NULL;
    if (py_zeros != NULL && py_arguments != NULL && py_keywords != NULL)
        py_tensor = PyObject_Call(py_zeros, py_arguments, py_keywords);
    Py_XDECREF(py_keywords);
    Py_XDECREF(py_arguments);
    Py_XDECREF(py_shape);
    Py_XDECREF(py_zeros);
    if (py_tensor != NULL) state->counters.tensors_native++;
    return py_tensor;
}

PyObject *stx_py_tensor_make_owned(struct stx_py_state *state, struct stx_arena *arena,
                                   uint64_t offset_bytes, const struct stx_tensor *tensor) {
    if (tensor->begin == tensor->end) return make_zeros(state, tensor);
    const struct memory memory = {.arena = arena,
                                  .begin_bytes = offset_bytes,
                                  .size_bytes = tensor->end - tensor->begin,
                                  .data = stx_arena_bytes(arena) + offset_bytes};
    return make(state, &memory, tensor);
}

/* --- what is looked up in torch --- */

static PyObject *find_optional(PyObject *py_module, const char *name) {
    PyObject *py_found = PyObject_GetAttrString(py_module, name);
    if (py_found == NULL) PyErr_Clear();
    return py_found;
}

int stx_py_torch_load(struct stx_py_state *state) {
    struct stx_py_torch *torch = &state->torch;
    if (torch->module != NULL) return 0;
    PyObject *py_torch = PyImport_ImportModule("torch");
    PyObject *py_core = py_torch == NULL ? NULL : PyObject_GetAttrString(py_torch, "_C");
    PyObject *py_from = py_core == NULL ? NULL : PyObject_GetAttrString(py_core, "_from_dlpack");
    if (py_from == NULL) {
        Py_XDECREF(py_core);
        Py_XDECREF(py_torch);
        return -1;
    }
    if (torch->module != NULL) { /* another thread came first while torch was imported */
        Py_DECREF(py_from);
        Py_DECREF(py_torch);
    } else {
        torch->exchange = find_exchange(py_torch);
        torch->dispatch_stack_depth = find_optional(py_core, "_len_torch_dispatch_stack");
        torch->function_stack_depth = find_optional(py_core, "_len_torch_function_stack");
        torch->from_dlpack = py_from;
        torch->module = py_torch;
    }
    Py_DECREF(py_core);
    return 0;
}

void stx_py_torch_clear(struct stx_py_state *state) {
    Py_CLEAR(state->torch.from_dlpack);
    Py_CLEAR(state->torch.dispatch_stack_depth);
    Py_CLEAR(state->torch.function_stack_depth);
    for (int dtype = 0; dtype < STX_DTYPE_COUNT; dtype++) Py_CLEAR(state->torch.dtypes[dtype]);
    Py_CLEAR(state->torch.module);
}
