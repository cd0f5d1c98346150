/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine on io_uring: one ring of 64 entries per load, no polling threads.
 *
 * DESIGN. Each request is handed to the kernel at once, so that the device works while the caller
 * does something else. The ring belongs to the thread that opened it, and completions are run in
 * that thread when it waits (DEFER_TASKRUN), where the kernel knows these flags. A ring is proven
 * by one empty request before it is used: sandboxes let a ring be made and then refuse its use.
 * What refused the ring is remembered for the process, since asking again gives the same answer.
 *
 * Guarantee: close returns when the kernel has nothing of this ring left to write. Kernels before
 * 5.11, which cannot wait with a time limit, are left to the threads. A build with STX_NO_URING
 * has no ring and says so.
 */
#include "engine.h"

#ifdef STX_NO_URING

static enum stx_status open_uring(struct stx_engine *engine,
                                  const struct stx_engine_options *options, struct stx_err *err) {
    (void)engine;
    (void)options;
    return stx_err_set(err, STX_ERR_UNSUPPORTED, "%s", stx_engine_refusal());
}

const char *stx_engine_refusal(void) { return "io_uring: not in this build"; }

const struct stx_engine_ops stx_engine_uring = {.name = "uring", .open = open_uring};

#else

#include <assert.h>
#include <errno.h>
#include <liburing.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <time.h>

/* Header of a liburing older than the flags: they have had these values since Linux 6.0, 6.1. */
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif

/* Beside the tag of a request that a worker of the kernel was asked to carry out. */
#define BY_WORKER (UINT64_C(1) << 32)

/* In place of an errno value: the ring is there, but of an old kernel. */
#define TOO_OLD 1000000

struct uring {
    struct io_uring ring;
    uint32_t pending; /* prepared and not completed, also those the kernel has not taken yet */
    bool is_broken;   /* the kernel refused to take requests */
    bool is_lonely;   /* the kernel found no worker for a request: requests go without one */
};

static atomic_int refused; /* an errno value, TOO_OLD, or 0 */

static const char *describe(int failure) {
    switch (failure) {
        case EPERM:
            return "io_uring: Operation not permitted";
        case EACCES:
            return "io_uring: Permission denied";
        case ENOSYS:
            return "io_uring: Function not implemented";
        case ENOMEM:
            return "io_uring: Cannot allocate memory";
        case EINVAL:
            return "io_uring: Invalid argument";
        case EMFILE:
        case ENFILE:
            return "io_uring: Too many open files";
        case TOO_OLD:
            return "io_uring: kernel before 5.11";
        default:
            return "io_uring: refused";
    }
}

const char *stx_engine_refusal(void) {
    const int failure = atomic_load_explicit(&refused, memory_order_relaxed);
    return failure == 0 ? NULL : describe(failure);
}

static enum stx_status refuse(int failure, struct stx_err *err) {
    /* Descriptors may be free the next time. */
    if (failure != EMFILE && failure != ENFILE)
        atomic_store_explicit(&refused, failure, memory_order_relaxed);
    return stx_err_set(err, STX_ERR_UNSUPPORTED, "%s", describe(failure));
}

/* One empty request there and back; 0 or an errno value. */
static int prove(struct io_uring *ring) {
    struct io_uring_cqe *cqe;
    struct io_uring_sqe *const sqe = io_uring_get_sqe(ring);
    int result;
    assert(sqe != NULL);
    io_uring_prep_nop(sqe);
    do result = io_uring_submit(ring);
    while (result == -EINTR);
    if (result != 1) return result < 0 ? -result : EAGAIN;
    do result = io_uring_wait_cqe(ring, &cqe);
    while (result == -EINTR);
    if (result < 0) return -result;
    io_uring_cqe_seen(ring, cqe);
    return 0;
}

static int make_ring(struct io_uring *ring) {
    int result = io_uring_queue_init(STX_ENGINE_DEPTH_MAX, ring,
                                     IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN);
    if (result == -EINVAL) result = io_uring_queue_init(STX_ENGINE_DEPTH_MAX, ring, 0);
    if (result < 0) return -result;
    const int failure = (ring->features & IORING_FEAT_EXT_ARG) != 0 ? prove(ring) : TOO_OLD;
    if (failure != 0) io_uring_queue_exit(ring);
    return failure;
}

static enum stx_status open_uring(struct stx_engine *engine,
                                  const struct stx_engine_options *options, struct stx_err *err) {
    const int failure_before = atomic_load_explicit(&refused, memory_order_relaxed);
    (void)options;
    if (failure_before != 0) return refuse(failure_before, err);
    struct uring *const uring = calloc(1, sizeof *uring);
    if (uring == NULL) return stx_err_set(err, STX_ERR_MEMORY, "no memory for a ring");
    const int failure = make_ring(&uring->ring);
    if (failure != 0) {
        free(uring);
        return refuse(failure, err);
    }
    engine->state = uring;
    return STX_OK;
}

/* Short of something just now: what stays behind goes with the next call. */
static bool is_passing(int result) {
    return result == -EINTR || result == -EAGAIN || result == -EBUSY || result == -ETIME;
}

static enum stx_status fail(struct uring *uring, int result, struct stx_err *err) {
    uring->is_broken = true;
    return stx_err_set_errno(err, -result, "io_uring_enter");
}

static enum stx_status submit(struct stx_engine *engine, const struct stx_io *io,
                              struct stx_err *err) {
    struct uring *const uring = engine->state;
    if (uring->is_broken) return stx_err_set_errno(err, EIO, "io_uring_enter");
    struct io_uring_sqe *const sqe = io_uring_get_sqe(&uring->ring);
    assert(sqe != NULL); /* as many entries as the largest depth */
    io_uring_prep_read(sqe, io->fd, io->buffer, io->size_bytes, io->offset_bytes);
    const bool by_worker = io->buffered && !uring->is_lonely;
    if (by_worker) io_uring_sqe_set_flags(sqe, IOSQE_ASYNC);
    sqe->user_data = io->tag | (by_worker ? BY_WORKER : 0);
    uring->pending++;
    const int result = io_uring_submit(&uring->ring);
    return result >= 0 || is_passing(result) ? STX_OK : fail(uring, result, err);
}

/* The result of a completion. Nobody here cancels, but the kernel does where it can make no worker
 * (a limit of processes): the request is to be sent again without one. What needs one even then
 * leaves no engine. */
static int32_t interpret(struct uring *uring, const struct io_uring_cqe *cqe) {
    if (cqe->res != -ECANCELED) return cqe->res;
    if ((cqe->user_data & BY_WORKER) == 0) uring->is_broken = true;
    uring->is_lonely = true;
    return -EAGAIN;
}

static enum stx_status reap(struct stx_engine *engine, struct stx_io_done done[], uint32_t capacity,
                            uint32_t timeout_ms, uint32_t *count, struct stx_err *err) {
    struct uring *const uring = engine->state;
    struct __kernel_timespec limit = {.tv_sec = timeout_ms / 1000,
                                      .tv_nsec = (long long)(timeout_ms % 1000) * 1000000};
    struct io_uring_cqe *cqe;
    unsigned head;
    if (uring->is_broken) return stx_err_set_errno(err, EIO, "io_uring_enter");
    const int result = io_uring_submit_and_wait_timeout(&uring->ring, &cqe, 1, &limit, NULL);
    if (result < 0 && !is_passing(result)) return fail(uring, result, err);
    io_uring_for_each_cqe(&uring->ring, head, cqe) {
        if (*count == capacity) break;
        done[(*count)++] =
            (struct stx_io_done){.tag = (uint32_t)cqe->user_data, .result = interpret(uring, cqe)};
    }
    io_uring_cq_advance(&uring->ring, *count);
    assert(uring->pending >= *count);
    uring->pending -= *count;
    if (uring->is_broken) return stx_err_set_errno(err, EAGAIN, "io_uring worker");
    if (*count == 0 && (result == -EAGAIN || result == -EBUSY))
        (void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL); /* not an endless hurry */
    return STX_OK;
}

static void close_uring(struct stx_engine *engine) {
    struct uring *const uring = engine->state;
    struct io_uring_cqe *cqe;
    /* What the kernel has not taken never begins: no call below submits. */
    while (uring->pending > io_uring_sq_ready(&uring->ring)) {
        const int result = io_uring_wait_cqe(&uring->ring, &cqe);
        if (result < 0 && is_passing(result)) continue;
        assert(result == 0);
        if (result < 0) break;
        io_uring_cqe_seen(&uring->ring, cqe);
        uring->pending--;
    }
    io_uring_queue_exit(&uring->ring);
    free(uring);
}

const struct stx_engine_ops stx_engine_uring = {
    .name = "uring",
    .open = open_uring,
    .submit = submit,
    .reap = reap,
    .close = close_uring,
};

#endif
