/* SPDX-License-Identifier: Apache-2.0
 *
 * Loads into owned memory.
 *
 * DESIGN. Direct reads are the fastest for what is cold and wasted on what is warm, so a sample of
 * the page cache decides per load. Fresh memory costs about as much as reading does, so one thread
 * makes pages while others read. A load below SMALL_BYTES is read by the calling thread: an engine
 * would cost more than it saves.
 */
#include "owned.h"

#include <assert.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "checked.h"
#include "mapping.h"
#include "residency.h"
#include "thread.h"
#include "trace.h"

#define SMALL_BYTES (UINT64_C(1) << 20)
#define SAMPLES_MAX 64
#define REMOTE_THREADS 16
#define POPULATE_BYTES_MIN (UINT64_C(32) << 20)
#define POPULATE_PIECE_BYTES (UINT64_C(8) << 20)

struct stx_plan_limits stx_owned_limits(uint64_t file_size_bytes) {
    return (struct stx_plan_limits){.gap_bytes = STX_OWNED_GAP_BYTES,
                                    .align_bytes = STX_LOAD_ALIGN_BYTES,
                                    .block_bytes = file_size_bytes < STX_OWNED_SMALL_FILE_BYTES
                                                       ? STX_OWNED_SMALL_BLOCK_BYTES
                                                       : STX_OWNED_BLOCK_BYTES};
}

/* The same of a system without cachestat: a mapping is needed to ask. */
static void ask_mapping(struct stx_owned_way *way, const struct stx_file *file,
                        const struct stx_read *reads, size_t reads_count) {
    struct stx_err ignored;
    struct stx_mapping *mapping = NULL;
    struct stx_range *ranges = calloc(reads_count + 1, sizeof *ranges);
    if (ranges != NULL && stx_mapping_open(&mapping, file, &ignored) == STX_OK) {
        for (size_t i = 0; i < reads_count; i++)
            ranges[i] = (struct stx_range){reads[i].begin_bytes, reads[i].end_bytes};
        const enum stx_residency residency = stx_residency_ask(mapping, ranges, reads_count);
        way->known = residency != STX_RESIDENCY_UNKNOWN;
        way->warm = residency == STX_RESIDENCY_WARM;
        stx_mapping_release(mapping);
    }
    free(ranges);
}

/* Ask for samples of the reads what the page cache has of them. */
static void ask_cache(struct stx_owned_way *way, const struct stx_file *file,
                      const struct stx_read *reads, size_t reads_count) {
    struct stx_err ignored;
    uint64_t cached_bytes = 0, asked_bytes = 0, total_bytes = 0, cached;
    const uint64_t begin_ns = stx_trace_begin();
    const size_t step = reads_count / SAMPLES_MAX + 1;
    for (size_t i = 0; i < reads_count; i += step) {
        if (stx_file_cached_range(file, reads[i].begin_bytes, reads[i].end_bytes, &cached,
                                  &ignored) != STX_OK) {
            ask_mapping(way, file, reads, reads_count);
            return;
        }
        cached_bytes += cached;
        asked_bytes += reads[i].end_bytes - reads[i].begin_bytes;
    }
    way->known = true;
    way->warm = cached_bytes >= asked_bytes - asked_bytes / 10;
    for (size_t i = 0; begin_ns != 0 && i < reads_count; i++)
        total_bytes += reads[i].end_bytes - reads[i].begin_bytes;
    STX_TRACE(STX_TRACE_CACHE, begin_ns, file->label, way->warm ? "warm" : "cold", total_bytes,
              asked_bytes, cached_bytes);
}

void stx_owned_way_open(struct stx_owned_way *way, const struct stx_file *file,
                        const struct stx_read *reads, size_t reads_count,
                        const struct stx_owned_options *options) {
    *way = (struct stx_owned_way){
        .load_file = {.fd = file->fd,
                      .direct_fd = -1,
                      .size_bytes = file->identity.size_bytes,
                      .label = file->label},
        .limits = {.engine = options->engine,
                   .inflight_bytes = options->inflight_bytes,
                   .threads_count = stx_file_is_remote(file) ? REMOTE_THREADS : 0}};
    ask_cache(way, file, reads, reads_count);
    if (options->direct_io == STX_DIRECT_OFF) {
        way->why_buffered = "direct_io is off";
    } else if (way->warm && options->direct_io == STX_DIRECT_AUTO) {
        way->why_buffered = "in the page cache";
    } else {
        way->load_file.direct_fd = stx_file_open_direct(file);
        if (way->load_file.direct_fd < 0) way->why_buffered = "the file system has no direct reads";
    }
}

void stx_owned_way_close(struct stx_owned_way *way) {
    if (way->load_file.direct_fd >= 0) (void)close(way->load_file.direct_fd);
    way->load_file.direct_fd = -1;
}

/* --- making pages --- */

struct populating {
    struct stx_arena *arena;
    atomic_bool stop;
    pthread_t thread;
};

static void *populate(void *argument) {
    struct populating *const populating = argument;
    const uint64_t size_bytes = stx_arena_size_bytes(populating->arena);
    for (uint64_t at = 0; at < size_bytes && !atomic_load(&populating->stop);
         at += POPULATE_PIECE_BYTES)
        stx_arena_populate(populating->arena, at,
                           stx_min_u64(at + POPULATE_PIECE_BYTES, size_bytes));
    return NULL;
}

/* Begin; NULL where it is not worth it or there is no thread. On the heap, not on a stack: a thread
 * of Python may end in the middle of a load, at the exit of the interpreter. */
static struct populating *populating_open(struct stx_arena *arena) {
    if (stx_arena_size_bytes(arena) < POPULATE_BYTES_MIN) return NULL;
    struct populating *populating = calloc(1, sizeof *populating);
    if (populating == NULL) return NULL;
    populating->arena = arena;
    atomic_init(&populating->stop, false);
    if (stx_thread_start(&populating->thread, populate, populating) == 0) return populating;
    free(populating);
    return NULL;
}

static void populating_close(struct populating *populating) {
    if (populating == NULL) return;
    atomic_store(&populating->stop, true);
    (void)pthread_join(populating->thread, NULL);
    free(populating);
}

/* --- the load --- */

enum stx_status stx_owned_run(const struct stx_load_job *job, struct stx_load_result *result,
                              struct stx_err *err) {
    const enum stx_status status = stx_load_run(job, result, err);
    if (status != STX_ERR_UNSUPPORTED || job->limits.engine == STX_ENGINE_AUTO) return status;
    struct stx_load_job any = *job;
    any.limits.engine = STX_ENGINE_AUTO;
    return stx_load_run(&any, result, err);
}

enum stx_status stx_owned_read_one(const struct stx_file *file, char *memory, uint64_t begin_bytes,
                                   uint64_t end_bytes, struct stx_load_result *result,
                                   struct stx_err *err) {
    const uint64_t size_bytes = end_bytes - begin_bytes, begin_ns = stx_trace_begin();
    const enum stx_status status = stx_file_read(file, memory, size_bytes, begin_bytes, err);
    const bool is_read = status == STX_OK;
    result->requests++;
    result->failed_offset_bytes = begin_bytes;
    if (is_read) result->bytes_read += size_bytes;
    if (!is_read) stx_trace_error(file->label, begin_bytes, err);
    STX_TRACE(STX_TRACE_READ, begin_ns, file->label, "plain", begin_bytes, size_bytes,
              is_read ? size_bytes : 0, 0, 0, is_read ? 0 : (uint64_t)err->sys_errno);
    return status;
}

enum stx_status stx_owned_read_plainly(const struct stx_file *file, const struct stx_read *reads,
                                       size_t reads_count, struct stx_arena *arena,
                                       struct stx_load_result *result, struct stx_err *err) {
    for (size_t i = 0; i < reads_count; i++)
        STX_TRY(stx_owned_read_one(file, stx_arena_bytes(arena) + reads[i].memory_bytes,
                                   reads[i].begin_bytes, reads[i].end_bytes, result, err));
    return STX_OK;
}

/* The exact bytes of each span, one after the other. */
static enum stx_status read_small(const struct stx_file *file, const struct stx_plan *plan,
                                  struct stx_arena *arena, struct stx_load_result *result,
                                  struct stx_err *err) {
    for (size_t i = 0; i < plan->spans_count; i++) {
        const struct stx_span *span = &plan->spans[i];
        const uint64_t place = stx_plan_place(plan->reads, plan->reads_count, span->begin_bytes);
        STX_TRY(stx_owned_read_one(file, stx_arena_bytes(arena) + place, span->begin_bytes,
                                   span->end_bytes, result, err));
    }
    return STX_OK;
}

struct whole {
    struct stx_arena *arena;
    const struct stx_owned_patience *patience;
};

static enum stx_load_next begin_whole(void *context, size_t piece, bool may_wait, char **memory) {
    const struct whole *whole = context;
    (void)piece, (void)may_wait;
    *memory = stx_arena_bytes(whole->arena);
    return STX_LOAD_READY;
}

static void done_whole(void *context, size_t piece) { (void)context, (void)piece; }

static bool keep_going(void *context) {
    const struct whole *whole = context;
    return whole->patience->keep_going(whole->patience->context);
}

static enum stx_status read_large(const struct stx_plan *plan, struct stx_arena *arena,
                                  const struct stx_owned_way *way,
                                  const struct stx_owned_patience *patience,
                                  struct stx_load_result *result, struct stx_err *err) {
    struct whole whole = {.arena = arena, .patience = patience};
    struct populating *const populating = populating_open(arena);
    const struct stx_load_piece piece = {.read_first = 0, .reads_count = plan->reads_count};
    const struct stx_load_job job = {.files = &way->load_file,
                                     .reads = plan->reads,
                                     .pieces = &piece,
                                     .files_count = 1,
                                     .reads_count = plan->reads_count,
                                     .pieces_count = 1,
                                     .hooks = {.context = &whole,
                                               .begin = begin_whole,
                                               .done = done_whole,
                                               .keep_going = keep_going},
                                     .limits = way->limits};
    const enum stx_status status = stx_owned_run(&job, result, err);
    populating_close(populating);
    return status;
}

enum stx_status stx_owned_read(const struct stx_file *file, const struct stx_plan *plan,
                               struct stx_arena *arena, const struct stx_owned_options *options,
                               const struct stx_owned_patience *patience,
                               struct stx_load_result *result, struct stx_owned_way *way,
                               struct stx_err *err) {
    *result = (struct stx_load_result){.engine = NULL, .failed_file = STX_LOAD_NO_FILE};
    *way = (struct stx_owned_way){.load_file = {.fd = -1, .direct_fd = -1, .size_bytes = 0}};
    assert(stx_arena_size_bytes(arena) >=
           stx_plan_memory_bytes(plan->reads, plan->reads_count, STX_LOAD_ALIGN_BYTES));
    if (plan->bytes_kept < SMALL_BYTES) return read_small(file, plan, arena, result, err);
    stx_owned_way_open(way, file, plan->reads, plan->reads_count, options);
    enum stx_status status = read_large(plan, arena, way, patience, result, err);
    if (status == STX_ERR_IO && result->failed_file == STX_LOAD_NO_FILE) /* no engine at all */
        status = stx_owned_read_plainly(file, plan->reads, plan->reads_count, arena, result, err);
    stx_owned_way_close(way);
    return status;
}
