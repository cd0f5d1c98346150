/* SPDX-License-Identifier: Apache-2.0
 *
 * Reads the tensors of a plan into memory of our own: decides how (small loads at once; else
 * direct where the file is cold and that works, through the page cache otherwise), has the memory's
 * pages made ahead of the reads, runs the load.
 *
 * Guarantee: after STX_OK every byte of the plan is in place and nothing will write there again;
 * after anything else the memory is the caller's to throw away. Waits; call it without the
 * interpreter's lock. No Python.
 */
#ifndef STX_OWNED_H
#define STX_OWNED_H

#include <stdbool.h>
#include <stdint.h>

#include "arena.h"
#include "engine.h"
#include "file.h"
#include "load.h"
#include "plan.h"

/* Spans nearer than this are read as one; reads are cut at multiples of the block. */
#define STX_OWNED_GAP_BYTES UINT64_C(4096)
#define STX_OWNED_BLOCK_BYTES (UINT64_C(4) << 20)
#define STX_OWNED_SMALL_BLOCK_BYTES (UINT64_C(1) << 20)
#define STX_OWNED_SMALL_FILE_BYTES (UINT64_C(64) << 20)

enum stx_direct_io { STX_DIRECT_AUTO, STX_DIRECT_ON, STX_DIRECT_OFF };

/* All zero: automatic. */
struct stx_owned_options {
    enum stx_engine_kind engine;
    enum stx_direct_io direct_io;
    uint64_t inflight_bytes;
};

/* How reads of a file will be done. Caller-owned; `load_file.direct_fd` is to be closed. */
struct stx_owned_way {
    struct stx_load_file load_file;
    struct stx_load_limits limits;
    bool known;               /* the system tells what is in the page cache, */
    bool warm;                /* and it holds nine tenths of what is to be read */
    const char *why_buffered; /* static; NULL where reads are direct */
};

/* The limits of a plan for owned memory, for a file of `file_size_bytes`. */
struct stx_plan_limits stx_owned_limits(uint64_t file_size_bytes);

/* Decide how `reads` will be done. `file` is borrowed as long as `way` is used. */
void stx_owned_way_open(struct stx_owned_way *way, const struct stx_file *file,
                        const struct stx_read *reads, size_t reads_count,
                        const struct stx_owned_options *options);
void stx_owned_way_close(struct stx_owned_way *way);

/* stx_load_run, with the best engine there is where the one that `job` names is not to be had. */
enum stx_status stx_owned_run(const struct stx_load_job *job, struct stx_load_result *result,
                              struct stx_err *err) STX_NODISCARD;

/* The bytes [begin, end) of `file`, by the calling thread, counted in `result`. Errors: STX_ERR_IO;
 * `result->failed_offset_bytes` says where. */
enum stx_status stx_owned_read_one(const struct stx_file *file, char *memory, uint64_t begin_bytes,
                                   uint64_t end_bytes, struct stx_load_result *result,
                                   struct stx_err *err) STX_NODISCARD;

/* The reads one after the other, by the calling thread, into the memory of their piece. Errors: as
 * stx_owned_read_one. */
enum stx_status stx_owned_read_plainly(const struct stx_file *file, const struct stx_read *reads,
                                       size_t reads_count, struct stx_arena *arena,
                                       struct stx_load_result *result,
                                       struct stx_err *err) STX_NODISCARD;

/* Asked at least every 100 ms; false cancels. */
struct stx_owned_patience {
    bool (*keep_going)(void *context);
    void *context;
};

/* Read all of `plan`, which has one input, into `arena`, which has stx_plan_memory_bytes of it.
 * Errors: as stx_load_run; `result->cancelled` with STX_OK if `patience` ended. */
enum stx_status stx_owned_read(const struct stx_file *file, const struct stx_plan *plan,
                               struct stx_arena *arena, const struct stx_owned_options *options,
                               const struct stx_owned_patience *patience,
                               struct stx_load_result *result, struct stx_owned_way *way,
                               struct stx_err *err) STX_NODISCARD;

#endif
