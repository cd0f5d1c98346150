/* SPDX-License-Identifier: Apache-2.0
 *
 * The device that is none: what the calls of device.h mean, in its plainest form.
 */
#include <string.h>

#include "device.h"

static enum stx_status enter(struct stx_device *device, int *before, struct stx_err *err) {
    (void)device, (void)err;
    *before = 0;
    return STX_OK;
}

static void leave(struct stx_device *device, int before) { (void)device, (void)before; }

static enum stx_status open_device(struct stx_device *device, struct stx_err *err) {
    (void)err;
    device->stream = NULL;
    return STX_OK;
}

static void close_device(struct stx_device *device) { (void)device; }

static bool pin(struct stx_device *device, void *memory, size_t size_bytes) {
    (void)device, (void)memory, (void)size_bytes;
    return true;
}

static void unpin(struct stx_device *device, void *memory) { (void)device, (void)memory; }

static enum stx_status copy(struct stx_device *device, uint64_t target, const void *source,
                            size_t size_bytes, struct stx_err *err) {
    (void)device, (void)err;
    memcpy((void *)(uintptr_t)target, source, size_bytes);
    return STX_OK;
}

static enum stx_status mark_init(struct stx_device *device, void **mark, struct stx_err *err) {
    (void)err;
    *mark = device;
    return STX_OK;
}

static void mark_free(struct stx_device *device, void *mark) { (void)device, (void)mark; }

static enum stx_status mark_nothing(struct stx_device *device, void *mark, struct stx_err *err) {
    (void)device, (void)mark, (void)err;
    return STX_OK;
}

static enum stx_status mark_ask(struct stx_device *device, void *mark, bool *has_come,
                                struct stx_err *err) {
    (void)device, (void)mark, (void)err;
    *has_come = true;
    return STX_OK;
}

static enum stx_status order_nothing(struct stx_device *device, void *stream, void *mark,
                                     struct stx_err *err) {
    (void)device, (void)stream, (void)mark, (void)err;
    return STX_OK;
}

const struct stx_device_ops stx_device_cpu = {.name = "cpu",
                                              .enter = enter,
                                              .leave = leave,
                                              .open = open_device,
                                              .close = close_device,
                                              .pin = pin,
                                              .unpin = unpin,
                                              .copy = copy,
                                              .mark_init = mark_init,
                                              .mark_free = mark_free,
                                              .mark_set = mark_nothing,
                                              .mark_ask = mark_ask,
                                              .mark_wait = mark_nothing,
                                              .copies_follow = order_nothing};
