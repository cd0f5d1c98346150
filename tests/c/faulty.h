/* SPDX-License-Identifier: Apache-2.0
 *
 * An engine in front of a real one, whose answers to some requests are not the real ones.
 *
 * It counts requests, knows which buffers are being read into, and spoils what a half answer leaves
 * unsaid, so that a loop which does not read that again is found out.
 */
#ifndef STX_TEST_FAULTY_H
#define STX_TEST_FAULTY_H

#include <errno.h>
#include <string.h>

#include "check.h"
#include "engine.h"

enum fault {
    FAULT_NONE,
    FAULT_SHORT_1,    /* one byte less than there was */
    FAULT_SHORT_5000, /* or one byte alone */
    FAULT_EINTR,
    FAULT_EAGAIN,
    FAULT_EIO,
    FAULT_EINVAL,
    FAULT_ZERO,
    FAULT_COUNT,
};

struct faulty {
    struct stx_engine *inner;
    enum fault fault;
    uint64_t first, last; /* requests by number, from 0: these fail */
    int only_fd;          /* of these only those of this descriptor; -1: of any */
    uint64_t deaf_from;   /* from this request on nothing is reaped, once: for cancellations */
    uint64_t submit_fails_at;
    uint64_t reap_fails_at; /* in the order of reaping */
    /* what it saw */
    uint64_t submitted, reaps, reaped, inflight_bytes, inflight_bytes_max;
    uint32_t inflight_max;
    struct stx_io ios[STX_ENGINE_DEPTH_MAX]; /* by tag; size 0: not outstanding */
    bool is_hit[STX_ENGINE_DEPTH_MAX];
};

/* Whether something is being read into a byte of [memory, memory + size). */
static inline bool faulty_writes_into(const struct faulty *faulty, const char *memory,
                                      size_t size_bytes) {
    for (uint32_t i = 0; i < STX_ENGINE_DEPTH_MAX; i++) {
        const struct stx_io *io = &faulty->ios[i];
        const char *buffer = io->buffer;
        if (io->size_bytes == 0) continue;
        if (buffer < memory + size_bytes && memory < buffer + io->size_bytes) return true;
    }
    return false;
}

static inline enum stx_status faulty_submit(struct stx_engine *engine, const struct stx_io *io,
                                            struct stx_err *err) {
    struct faulty *faulty = engine->state;
    const uint64_t number = faulty->submitted;
    if (number == faulty->submit_fails_at) return stx_err_set_errno(err, ENOMEM, "submit");
    CHECK(io->tag < STX_ENGINE_DEPTH_MAX && faulty->ios[io->tag].size_bytes == 0);
    CHECK(!faulty_writes_into(faulty, io->buffer, io->size_bytes));
    STX_TRY(stx_engine_submit(faulty->inner, io, err));
    faulty->submitted++;
    faulty->ios[io->tag] = *io;
    faulty->is_hit[io->tag] = number >= faulty->first && number <= faulty->last &&
                              (faulty->only_fd < 0 || faulty->only_fd == io->fd);
    faulty->inflight_bytes += io->size_bytes;
    if (faulty->inflight_bytes > faulty->inflight_bytes_max)
        faulty->inflight_bytes_max = faulty->inflight_bytes;
    if (engine->outstanding + 1 > faulty->inflight_max)
        faulty->inflight_max = engine->outstanding + 1;
    return STX_OK;
}

static inline int32_t faulty_answer(const struct faulty *faulty, int32_t result) {
    switch (faulty->fault) {
        case FAULT_SHORT_1:
            return result > 1 ? result - 1 : result;
        case FAULT_SHORT_5000:
            return result > 5000 ? result - 5000 : result > 1 ? 1 : result;
        case FAULT_EINTR:
            return -EINTR;
        case FAULT_EAGAIN:
            return -EAGAIN;
        case FAULT_EIO:
            return -EIO;
        case FAULT_EINVAL:
            return -EINVAL;
        case FAULT_ZERO:
            return 0;
        default:
            return result;
    }
}

static inline enum stx_status faulty_reap(struct stx_engine *engine, struct stx_io_done done[],
                                          uint32_t capacity, uint32_t timeout_ms, uint32_t *count,
                                          struct stx_err *err) {
    struct faulty *faulty = engine->state;
    faulty->reaps++;
    if (faulty->submitted > faulty->deaf_from) {
        faulty->deaf_from = UINT64_MAX;
        return STX_OK;
    }
    if (faulty->reaped >= faulty->reap_fails_at) return stx_err_set_errno(err, EBADF, "reap");
    STX_TRY(stx_engine_reap(faulty->inner, done, capacity, timeout_ms, count, err));
    for (uint32_t i = 0; i < *count; i++) {
        struct stx_io *io = &faulty->ios[done[i].tag];
        CHECK(io->size_bytes != 0);
        if (faulty->is_hit[done[i].tag]) {
            done[i].result = faulty_answer(faulty, done[i].result);
            const uint32_t told_bytes = done[i].result < 0 ? 0 : (uint32_t)done[i].result;
            if (faulty->first == faulty->last)
                memset((char *)io->buffer + told_bytes, 0xEE, io->size_bytes - told_bytes);
        }
        faulty->inflight_bytes -= io->size_bytes;
        io->size_bytes = 0;
    }
    faulty->reaped += *count;
    return STX_OK;
}

static inline void faulty_close(struct stx_engine *engine) {
    struct faulty *faulty = engine->state;
    stx_engine_close(faulty->inner);
}

/* `engine` answers like `inner`, which it closes, until `faulty` is told otherwise. */
static inline void faulty_open(struct stx_engine *engine, struct faulty *faulty,
                               struct stx_engine *inner) {
    static const struct stx_engine_ops ops = {"faulty", NULL, faulty_submit, faulty_reap,
                                              faulty_close};
    *faulty = (struct faulty){.inner = inner,
                              .first = UINT64_MAX,
                              .last = UINT64_MAX,
                              .only_fd = -1,
                              .deaf_from = UINT64_MAX,
                              .submit_fails_at = UINT64_MAX,
                              .reap_fails_at = UINT64_MAX};
    *engine = (struct stx_engine){.ops = &ops, .state = faulty, .depth = inner->depth};
}

#endif
