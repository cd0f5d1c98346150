/* SPDX-License-Identifier: Apache-2.0
 *
 * The seam below every load: reads of files, many at a time, by whatever the system does best.
 *
 * An engine is opened, given requests, asked for their completions, and closed. Two siblings, best
 * first: io_uring, then a pool of threads; an `open` that answers STX_ERR_UNSUPPORTED means "try
 * the next". Guarantees: a request ends in exactly one completion; what the kernel answered is
 * told as it is, half reads and errors too, since only the caller knows what to do about them;
 * after close nothing writes into any buffer any more. An engine does not retry and does not know
 * what is in a file.
 *
 * Thread rule: every call for one engine comes from the thread that opened it. A child made by
 * fork() must not touch an engine of its parent.
 */
#ifndef STX_ENGINE_H
#define STX_ENGINE_H

#include <stdbool.h>
#include <stdint.h>

#include "err.h"

#define STX_ENGINE_DEPTH_MAX 64

/* One read. The file and the buffer are borrowed until its completion was reaped or the engine is
 * closed. */
struct stx_io {
    int fd;
    bool buffered; /* it goes through the page cache: io_uring then has a kernel thread do it */
    void *buffer;
    uint64_t offset_bytes;
    uint32_t size_bytes; /* at most STX_IO_BYTES_MAX */
    uint32_t tag;        /* comes back with the completion */
};

/* The kernel moves less than 2 GiB per call. */
#define STX_IO_BYTES_MAX (UINT32_C(1) << 30)

struct stx_io_done {
    uint32_t tag;
    int32_t result; /* bytes, possibly fewer than asked, 0 at the end of the file; or -errno */
};

enum stx_engine_kind {
    STX_ENGINE_AUTO,
    STX_ENGINE_URING,
    STX_ENGINE_THREADS,
};

struct stx_engine_options {
    enum stx_engine_kind kind;
    uint32_t depth;         /* most outstanding; 0: STX_ENGINE_DEPTH_MAX, which it never exceeds */
    uint32_t threads_count; /* of the pool, at most; 0: min(4, processors) */
};

struct stx_engine;

/* One implementation. `open` is called by stx_engine_open alone. */
struct stx_engine_ops {
    const char *name;
    enum stx_status (*open)(struct stx_engine *engine, const struct stx_engine_options *options,
                            struct stx_err *err);
    enum stx_status (*submit)(struct stx_engine *engine, const struct stx_io *io,
                              struct stx_err *err);
    enum stx_status (*reap)(struct stx_engine *engine, struct stx_io_done done[], uint32_t capacity,
                            uint32_t timeout_ms, uint32_t *count, struct stx_err *err);
    void (*close)(struct stx_engine *engine);
};

extern const struct stx_engine_ops stx_engine_uring;
extern const struct stx_engine_ops stx_engine_threads;

/* Caller-owned; all zero when closed. Whoever puts an engine of their own in front of another fills
 * it in themselves. */
struct stx_engine {
    const struct stx_engine_ops *ops;
    void *state;          /* the implementation's */
    uint32_t depth;       /* most outstanding, 1 to STX_ENGINE_DEPTH_MAX */
    uint32_t outstanding; /* submitted and not reaped */
};

/* Open the best engine there is, or the one of `options->kind`. On error `engine` is closed.
 * Errors: STX_ERR_UNSUPPORTED if that kind is not to be had, STX_ERR_MEMORY, STX_ERR_IO. */
enum stx_status stx_engine_open(struct stx_engine *engine, const struct stx_engine_options *options,
                                struct stx_err *err) STX_NODISCARD;

/* Begin one read; `io` itself is copied. Never waits for a completion. Fewer than `depth` are
 * outstanding. Errors: STX_ERR_IO, when this read has not begun and never will. */
enum stx_status stx_engine_submit(struct stx_engine *engine, const struct stx_io *io,
                                  struct stx_err *err) STX_NODISCARD;

/* Wait until something completed, the time is over or a signal came; `*count` completions are then
 * in `done`, 0 in the latter cases. Something is outstanding, and `capacity` is not 0. Errors:
 * STX_ERR_IO: no more can be had from this engine, and it must be closed before a buffer goes. */
enum stx_status stx_engine_reap(struct stx_engine *engine, struct stx_io_done done[],
                                uint32_t capacity, uint32_t timeout_ms, uint32_t *count,
                                struct stx_err *err) STX_NODISCARD;

/* Wait for whatever was begun, without a time limit, and release everything. A closed engine is
 * fine. */
void stx_engine_close(struct stx_engine *engine);

/* Why this process does without io_uring, such as "io_uring: Operation not permitted"; NULL while
 * nothing has refused it. Static. Any thread. */
const char *stx_engine_refusal(void);

#endif
