/* SPDX-License-Identifier: Apache-2.0
 *
 * The one loop that reads a plan into memory: it feeds an engine, and decides what every completion
 * means.
 *
 * Guarantees: reads begin in their order, pieces complete in any; a piece is called done when every
 * byte it asked for is there and no request that could write into it exists or will ever exist;
 * after an error or a cancellation nothing new begins, no hook is called again, and the loop
 * returns when the kernel has nothing left to write. Bytes and requests in flight are bounded.
 * Where direct I/O is refused a file goes on through the page cache. Opens no file, allocates no
 * destination, never calls Python.
 */
#ifndef STX_LOAD_H
#define STX_LOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine.h"
#include "err.h"
#include "plan.h"

/* Direct reads begin and end at its multiples, in the file and in memory. */
#define STX_LOAD_ALIGN_BYTES UINT64_C(4096)

/* Both descriptors are borrowed. */
struct stx_load_file {
    int fd;              /* reads through the page cache */
    int direct_fd;       /* the same file opened with O_DIRECT; -1: none */
    uint64_t size_bytes; /* as it was opened: no read ends beyond */
    uint32_t label;      /* in a recording (trace.h) */
};

/* Reads that are to be in memory together. A read lands at its `memory_bytes` from what `begin`
 * gave. With a direct descriptor a read is rounded up to STX_LOAD_ALIGN_BYTES, so there must be
 * room for that behind a read which ends elsewhere (at the end of the file). A read whose place in
 * the file or in memory is not aligned goes through the page cache. */
struct stx_load_piece {
    size_t read_first;
    size_t reads_count; /* 0: done as soon as it has begun */
};

enum stx_load_next {
    STX_LOAD_READY,
    STX_LOAD_LATER,  /* nothing is free now */
    STX_LOAD_STOP,   /* cancels */
    STX_LOAD_FAILED, /* there is no memory and will be none: STX_ERR_MEMORY */
};

/* Called by the loop, in its thread. */
struct stx_load_hooks {
    void *context;
    /* Memory for a piece, asked for in the order of the pieces; after READY `*memory` is the
     * loop's until `done`, or until it returns. LATER: asked again after the next completion. With
     * `may_wait` nothing is in flight and the hook may wait, up to 100 ms at a time, then LATER. */
    enum stx_load_next (*begin)(void *context, size_t piece, bool may_wait, char **memory);
    /* All bytes of the piece are there; the loop does not touch its memory again. */
    void (*done)(void *context, size_t piece);
    /* Asked at least every 100 ms, and soon after a signal; false cancels. */
    bool (*keep_going)(void *context);
};

/* All zero: automatic. */
struct stx_load_limits {
    uint64_t inflight_bytes; /* 0: 16 MiB, up to 64 MiB while that reads faster. One read larger
                                than this goes alone. */
    enum stx_engine_kind engine;
    uint32_t threads_count; /* of the thread engine; 0: its default */
};

#define STX_LOAD_NO_FILE UINT32_MAX

struct stx_load_result {
    uint64_t requests;            /* submitted */
    uint64_t retries;             /* of these: not the first of their read */
    uint64_t bytes_read;          /* that the system delivered, alignment and repeats included */
    const char *engine;           /* static */
    bool direct;                  /* something was read past the page cache */
    bool cancelled;               /* by a hook; the status is STX_OK then */
    uint32_t failed_file;         /* whose read failed, else STX_LOAD_NO_FILE */
    uint64_t failed_offset_bytes; /* and where */
};

/* What is to be done; everything is borrowed. */
struct stx_load_job {
    const struct stx_load_file *files;
    const struct stx_read *reads;
    const struct stx_load_piece *pieces;
    uint32_t files_count;
    size_t reads_count;
    size_t pieces_count;
    struct stx_load_hooks hooks;
    struct stx_load_limits limits;
};

/* Read all pieces, in the calling thread, with an engine made for it. `result` is filled whatever
 * the status. When this returns, all memory is the caller's again. Errors: STX_ERR_IO (of the first
 * read that failed, also where a file ends too early), STX_ERR_MEMORY, STX_ERR_UNSUPPORTED if the
 * limits name an engine that is not to be had. */
enum stx_status stx_load_run(const struct stx_load_job *job, struct stx_load_result *result,
                             struct stx_err *err) STX_NODISCARD;

/* The same on an open engine with nothing outstanding; the job's choice of engine does not matter.
 * After an error, close the engine before memory goes: a broken one is drained by that alone. */
enum stx_status stx_load_run_on(struct stx_engine *engine, const struct stx_load_job *job,
                                struct stx_load_result *result, struct stx_err *err) STX_NODISCARD;

#endif
