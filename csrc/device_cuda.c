/* SPDX-License-Identifier: Apache-2.0
 *
 * CUDA by its runtime library, and ROCm by the same calls under its names.
 *
 * Nothing is linked: the calls are bound to the runtime that torch has already mapped into this
 * process, so that one build serves all, and streams and contexts are torch's own. Types and
 * prototypes are written out here and compared with the runtime's header where one is found at
 * build time.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h> /* snprintf */

#include "device.h"

#if defined(__has_include)
#if __has_include(<cuda_runtime_api.h>)
#include <cuda_runtime_api.h>
#define HAS_HEADER 1
#endif
#endif

typedef unsigned int cuda_status; /* an enum without negative values */
typedef struct CUstream_st *cuda_stream;
typedef struct CUevent_st *cuda_event;

#define SUCCESS 0u
#define NOT_READY 600u
#define STREAM_NON_BLOCKING 1u
#define EVENT_DISABLE_TIMING 2u
#define REGISTER_PORTABLE 1u
#define HOST_TO_DEVICE 1u

/* (our name, its name without the prefix, parameters) */
#define CALLS(CALL)                                                                            \
    CALL(get_device, GetDevice, (int *))                                                       \
    CALL(set_device, SetDevice, (int))                                                         \
    CALL(host_register, HostRegister, (void *, size_t, unsigned int))                          \
    CALL(host_unregister, HostUnregister, (void *))                                            \
    CALL(stream_create, StreamCreateWithFlags, (cuda_stream *, unsigned int))                  \
    CALL(stream_destroy, StreamDestroy, (cuda_stream))                                         \
    CALL(stream_wait_event, StreamWaitEvent, (cuda_stream, cuda_event, unsigned int))          \
    CALL(memcpy_async, MemcpyAsync, (void *, const void *, size_t, unsigned int, cuda_stream)) \
    CALL(event_create, EventCreateWithFlags, (cuda_event *, unsigned int))                     \
    CALL(event_record, EventRecord, (cuda_event, cuda_stream))                                 \
    CALL(event_query, EventQuery, (cuda_event))                                                \
    CALL(event_synchronize, EventSynchronize, (cuda_event))                                    \
    CALL(event_destroy, EventDestroy, (cuda_event))                                            \
    CALL(last_error, GetLastError, (void))

/* NOLINTNEXTLINE(bugprone-macro-parentheses): a declaration has none */
#define DECLARE(ours, theirs, parameters) cuda_status(*ours) parameters;
struct runtime {
    CALLS(DECLARE)
    const char *(*error_string)(cuda_status);
};

#ifdef HAS_HEADER
#define COMPARE(ours, theirs, parameters)                                                          \
    _Static_assert(__builtin_types_compatible_p(__typeof__(cuda##theirs), cuda_status parameters), \
                   "cuda" #theirs " is declared otherwise");
CALLS(COMPARE)
_Static_assert(SUCCESS == cudaSuccess && NOT_READY == cudaErrorNotReady &&
                   STREAM_NON_BLOCKING == cudaStreamNonBlocking &&
                   EVENT_DISABLE_TIMING == cudaEventDisableTiming &&
                   REGISTER_PORTABLE == cudaHostRegisterPortable &&
                   HOST_TO_DEVICE == cudaMemcpyHostToDevice,
               "a constant has another value");
#endif

static pthread_mutex_t bind_lock = PTHREAD_MUTEX_INITIALIZER;
static struct runtime runtime; /* written once under the lock, before is_bound */
static bool is_bound;

/* --- binding --- */

static bool bind_call(void *library, const char *prefix, const char *name, void *call) {
    char symbol[64];
    (void)snprintf(symbol, sizeof symbol, "%s%s", prefix, name);
    void *const found = dlsym(library, symbol);
    *(void **)call = found; /* POSIX lets a function be kept in a void pointer */
    return found != NULL;
}

static bool bind_all(void *library, const char *prefix) {
    struct runtime found;
    bool complete = bind_call(library, prefix, "GetErrorString", (void *)&found.error_string);
#define BIND(ours, theirs, parameters) \
    complete = complete && bind_call(library, prefix, #theirs, (void *)&found.ours);
    CALLS(BIND)
    if (complete) runtime = found;
    return complete;
}

/* The library stays: its calls are kept for the rest of the process. */
static bool bind_library(const char *name, const char *prefix, int flags) {
    void *const library = dlopen(name, RTLD_LAZY | RTLD_LOCAL | flags);
    return library != NULL && bind_all(library, prefix);
}

enum stx_status stx_device_cuda_bind(const char *path, struct stx_err *err) {
    (void)pthread_mutex_lock(&bind_lock);
    const bool found = bind_library(path, "cuda", 0);
    is_bound = is_bound || found;
    (void)pthread_mutex_unlock(&bind_lock);
    if (found) return STX_OK;
    return stx_err_set(err, STX_ERR_UNSUPPORTED, "%s is no CUDA runtime", path);
}

/* --- the calls --- */

/* Whether a call went well. A failure is also kept for whoever asks next: torch does, and would
 * take ours for its own. */
static bool is_well(cuda_status status) {
    if (status != SUCCESS) (void)runtime.last_error();
    return status == SUCCESS;
}

/* What a call answered, as a status of ours. */
static enum stx_status check(cuda_status status, const char *what, struct stx_err *err) {
    if (is_well(status)) return STX_OK;
    const char *const text = runtime.error_string(status);
    return stx_err_set(err, STX_ERR_DEVICE, "CUDA error in %s: %s", what,
                       text == NULL ? "unknown" : text);
}

static enum stx_status enter(struct stx_device *device, int *before, struct stx_err *err) {
    STX_TRY(check(runtime.get_device(before), "cudaGetDevice", err));
    if (*before == device->index) return STX_OK;
    return check(runtime.set_device(device->index), "cudaSetDevice", err);
}

static void leave(struct stx_device *device, int before) {
    if (before != device->index) (void)is_well(runtime.set_device(before));
}

static enum stx_status open_device(struct stx_device *device, struct stx_err *err) {
    cuda_stream stream = NULL;
    STX_TRY(check(runtime.stream_create(&stream, STREAM_NON_BLOCKING), "cudaStreamCreate", err));
    device->stream = stream;
    return STX_OK;
}

static void close_device(struct stx_device *device) {
    if (device->stream != NULL) (void)is_well(runtime.stream_destroy(device->stream));
    device->stream = NULL;
}

static bool pin(struct stx_device *device, void *memory, size_t size_bytes) {
    (void)device;
    return is_well(runtime.host_register(memory, size_bytes, REGISTER_PORTABLE));
}

static void unpin(struct stx_device *device, void *memory) {
    (void)device;
    (void)is_well(runtime.host_unregister(memory));
}

static enum stx_status copy(struct stx_device *device, uint64_t target, const void *source,
                            size_t size_bytes, struct stx_err *err) {
    return check(runtime.memcpy_async((void *)(uintptr_t)target, source, size_bytes, HOST_TO_DEVICE,
                                      device->stream),
                 "cudaMemcpyAsync", err);
}

static enum stx_status mark_init(struct stx_device *device, void **mark, struct stx_err *err) {
    cuda_event event = NULL;
    (void)device;
    STX_TRY(check(runtime.event_create(&event, EVENT_DISABLE_TIMING), "cudaEventCreate", err));
    *mark = event;
    return STX_OK;
}

static void mark_free(struct stx_device *device, void *mark) {
    (void)device;
    (void)is_well(runtime.event_destroy(mark));
}

static enum stx_status mark_set(struct stx_device *device, void *mark, struct stx_err *err) {
    return check(runtime.event_record(mark, device->stream), "cudaEventRecord", err);
}

static enum stx_status mark_ask(struct stx_device *device, void *mark, bool *has_come,
                                struct stx_err *err) {
    const cuda_status status = runtime.event_query(mark);
    (void)device;
    *has_come = status == SUCCESS;
    if (status == NOT_READY && !is_well(status)) return STX_OK;
    return check(status, "cudaEventQuery", err);
}

static enum stx_status mark_wait(struct stx_device *device, void *mark, struct stx_err *err) {
    (void)device;
    return check(runtime.event_synchronize(mark), "cudaEventSynchronize", err);
}

static enum stx_status copies_follow(struct stx_device *device, void *stream, void *mark,
                                     struct stx_err *err) {
    STX_TRY(check(runtime.event_record(mark, stream), "cudaEventRecord", err));
    return check(runtime.stream_wait_event(device->stream, mark, 0), "cudaStreamWaitEvent", err);
}

static const struct stx_device_ops ops = {.name = "cuda",
                                          .enter = enter,
                                          .leave = leave,
                                          .open = open_device,
                                          .close = close_device,
                                          .pin = pin,
                                          .unpin = unpin,
                                          .copy = copy,
                                          .mark_init = mark_init,
                                          .mark_free = mark_free,
                                          .mark_set = mark_set,
                                          .mark_ask = mark_ask,
                                          .mark_wait = mark_wait,
                                          .copies_follow = copies_follow};

const struct stx_device_ops *stx_device_cuda(void) {
    static const struct {
        const char *library, *prefix;
    } runtimes[] = {{"libcudart.so.13", "cuda"},   {"libcudart.so.12", "cuda"},
                    {"libcudart.so.11.0", "cuda"}, {"libamdhip64.so", "hip"},
                    {"libamdhip64.so.7", "hip"},   {"libamdhip64.so.6", "hip"}};
    (void)pthread_mutex_lock(&bind_lock);
    for (size_t i = 0; !is_bound && i < sizeof runtimes / sizeof runtimes[0]; i++)
        is_bound = bind_library(runtimes[i].library, runtimes[i].prefix, RTLD_NOLOAD);
    const bool found = is_bound;
    (void)pthread_mutex_unlock(&bind_lock);
    return found ? &ops : NULL;
}
