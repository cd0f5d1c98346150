/* SPDX-License-Identifier: Apache-2.0
 *
 * What a load needs of the device that its tensors are on: staging memory that the device can read
 * quickly, copies that go on beside everything else, and marks in their order.
 *
 * Guarantees: a copy reads its source and writes its target at some time between the call and the
 * moment when a mark that was set after it has come; copies and marks of one device happen in the
 * order of their calls. Knows no files. Any thread, between enter and leave.
 */
#ifndef STX_DEVICE_H
#define STX_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "err.h"

struct stx_device;

/* One kind of device. Every call that can fail sets STX_ERR_DEVICE in the runtime's own words. */
struct stx_device_ops {
    const char *name;
    /* Make the device the calling thread's; `*before` is for leave. */
    enum stx_status (*enter)(struct stx_device *device, int *before, struct stx_err *err);
    void (*leave)(struct stx_device *device, int before);

    /* What copies need, between enter and leave. On error nothing is open. */
    enum stx_status (*open)(struct stx_device *device, struct stx_err *err);
    void (*close)(struct stx_device *device);

    /* Let the device read [memory, memory + size_bytes) without a detour; false: it will be slower.
     */
    bool (*pin)(struct stx_device *device, void *memory, size_t size_bytes);
    void (*unpin)(struct stx_device *device, void *memory);

    /* Begin to copy to `target`, an address on the device. */
    enum stx_status (*copy)(struct stx_device *device, uint64_t target, const void *source,
                            size_t size_bytes, struct stx_err *err);

    enum stx_status (*mark_init)(struct stx_device *device, void **mark, struct stx_err *err);
    void (*mark_free)(struct stx_device *device, void *mark);
    /* Set it behind all copies so far. One that has come can be set again. */
    enum stx_status (*mark_set)(struct stx_device *device, void *mark, struct stx_err *err);
    enum stx_status (*mark_ask)(struct stx_device *device, void *mark, bool *has_come,
                                struct stx_err *err);
    enum stx_status (*mark_wait)(struct stx_device *device, void *mark, struct stx_err *err);

    /* Copies from now on wait for what was given to `stream` so far. `mark` is set on the way. */
    enum stx_status (*copies_follow)(struct stx_device *device, void *stream, void *mark,
                                     struct stx_err *err);
};

/* Caller-owned; `ops` and `index` are set by whoever opens it. */
struct stx_device {
    const struct stx_device_ops *ops;
    int index;
    void *stream; /* the copies', made by open */
};

/* Memory of this process: a copy is a memcpy, and marks have come at once. */
extern const struct stx_device_ops stx_device_cpu;

/* NVIDIA's runtime, or AMD's under its names, as it is already in this process: nothing is loaded.
 * NULL where there is none. Any thread. */
const struct stx_device_ops *stx_device_cuda(void);

/* For tests: use the runtime at `path` from here on. Errors: STX_ERR_UNSUPPORTED. */
enum stx_status stx_device_cuda_bind(const char *path, struct stx_err *err) STX_NODISCARD;

#endif
