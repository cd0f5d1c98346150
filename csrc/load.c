/* SPDX-License-Identifier: Apache-2.0
 *
 * The loop: fill the engine up to the budget, wait for completions, decide what each one means.
 *
 * DESIGN. A request is one slot of at most 64 and stands for one read until all of that read is
 * there: a short answer moves it forward and sends it again. So a read never has two requests, and
 * a piece whose last read is whole has none. A direct request that is sent again begins at the
 * alignment boundary below, inside its own read, hence inside its own piece. A piece that has begun
 * and is not done has a request in some slot, but for the one that is being begun, which bounds
 * the pieces at work by the slots plus one: nothing here grows.
 *
 * After the first error or a cancellation the loop only waits for what is outstanding.
 */
#include "load.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h> /* snprintf */
#include <stdlib.h>
#include <time.h>

#include "checked.h"
#include "trace.h"

#define SLOTS_MAX STX_ENGINE_DEPTH_MAX
#define NONE UINT32_MAX
#define BUDGET_FIRST_BYTES (UINT64_C(16) << 20)
#define BUDGET_LAST_BYTES (UINT64_C(64) << 20)
#define BUDGET_WINDOW_BYTES (UINT64_C(256) << 20)
/* How often one read is sent again after EINTR or EAGAIN; from when on EAGAIN is not hurried. */
#define TRIES_MAX 1000
#define TRIES_HASTY 16
#define WAIT_MS 50

enum { DIRECT_UNTRIED, DIRECT_PROVEN, DIRECT_REFUSED };

struct request {
    const struct stx_read *read;
    uint64_t at_bytes;    /* file offset; what the read wants before it is there */
    uint64_t begin_bytes; /* file offset of the request in flight; at most `at_bytes` */
    uint32_t size_bytes;  /* of the request in flight */
    uint32_t work;        /* which piece */
    uint32_t tries;
    uint32_t sent_count;
    uint64_t sent_ns; /* while somebody records */
    bool is_direct;   /* the request in flight */
    bool needs_cache; /* the rest of this read does without direct I/O */
};

/* A piece at work; `left` reads of it are not whole. */
struct work {
    size_t piece;
    size_t left;
    char *memory;
    bool is_used;
};

struct budget {
    uint64_t bytes;
    uint64_t window_bytes; /* read since `window_ns` */
    uint64_t window_ns;
    uint64_t rate; /* of the window before, in bytes per ms */
    bool grows;
};

struct loop {
    const struct stx_load_job *job;
    struct stx_engine *engine;
    struct stx_load_result *result;
    uint8_t *directs; /* of each file */
    uint64_t asked_ns;
    uint64_t inflight_bytes;
    size_t next_piece;
    size_t next_read;   /* within the piece being begun */
    uint32_t beginning; /* whose reads are being sent: an index of `works`, or NONE */
    uint32_t free_count;
    uint32_t again_count;
    struct budget budget;
    uint32_t free[SLOTS_MAX];  /* slots without a read */
    uint32_t again[SLOTS_MAX]; /* slots to be sent again */
    struct request requests[SLOTS_MAX];
    struct work works[SLOTS_MAX + 1];
};

static uint64_t now_ns(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static bool is_aligned(uint64_t value) { return value % STX_LOAD_ALIGN_BYTES == 0; }

/* --- the budget --- */

static struct budget make_budget(uint64_t asked_bytes) {
    return (struct budget){.bytes = asked_bytes == 0 ? BUDGET_FIRST_BYTES : asked_bytes,
                           .window_ns = now_ns(),
                           .grows = asked_bytes == 0};
}

/* More in flight, while that pays: by more than 5 % from one window to the next. */
static void grow(struct budget *budget, uint64_t got_bytes) {
    budget->window_bytes += got_bytes;
    if (!budget->grows || budget->window_bytes < BUDGET_WINDOW_BYTES) return;
    const uint64_t now = now_ns();
    const uint64_t elapsed_ns = stx_max_u64(now - budget->window_ns, 1);
    const uint64_t rate = budget->window_bytes * 1000000 / elapsed_ns;
    if (rate * 100 > budget->rate * 105)
        budget->bytes *= 2;
    else
        budget->grows = false;
    if (budget->bytes >= BUDGET_LAST_BYTES) budget->grows = false;
    budget->rate = rate;
    budget->window_bytes = 0;
    budget->window_ns = now;
}

/* --- sending --- */

/* Decide how the rest of a read is asked for. */
static struct stx_io aim(struct loop *loop, uint32_t slot) {
    struct request *const request = &loop->requests[slot];
    const struct stx_read *const read = request->read;
    const struct stx_load_file *const file = &loop->job->files[read->file_index];
    char *const start = loop->works[request->work].memory + read->memory_bytes;
    request->is_direct = file->direct_fd >= 0 && !request->needs_cache &&
                         loop->directs[read->file_index] != DIRECT_REFUSED &&
                         is_aligned(read->begin_bytes) && is_aligned((uint64_t)(uintptr_t)start);
    const uint64_t align_bytes = request->is_direct ? STX_LOAD_ALIGN_BYTES : 1;
    request->begin_bytes = stx_align_down(request->at_bytes, align_bytes);
    const uint64_t end_bytes = stx_align_up(read->end_bytes, align_bytes);
    request->size_bytes = (uint32_t)stx_min_u64(end_bytes - request->begin_bytes, STX_IO_BYTES_MAX);
    return (struct stx_io){.fd = request->is_direct ? file->direct_fd : file->fd,
                           .buffered = !request->is_direct,
                           .buffer = start + (request->begin_bytes - read->begin_bytes),
                           .offset_bytes = request->begin_bytes,
                           .size_bytes = request->size_bytes,
                           .tag = slot};
}

static enum stx_status send(struct loop *loop, uint32_t slot, struct stx_err *err) {
    struct request *const request = &loop->requests[slot];
    const struct stx_io io = aim(loop, slot);
    request->sent_ns = stx_trace_begin();
    STX_TRY(stx_engine_submit(loop->engine, &io, err));
    loop->inflight_bytes += io.size_bytes;
    loop->result->requests++;
    loop->result->retries += request->sent_count++ != 0 ? 1 : 0;
    return STX_OK;
}

static void finish_piece(struct loop *loop, struct work *work) {
    work->is_used = false;
    loop->job->hooks.done(loop->job->hooks.context, work->piece);
}

/* Get memory for the next piece; `*later` if there is none now. */
static enum stx_status begin_piece(struct loop *loop, bool *later, struct stx_err *err) {
    const struct stx_load_hooks *const hooks = &loop->job->hooks;
    const bool may_wait = loop->engine->outstanding == 0;
    char *memory = NULL;
    uint32_t index = 0;
    switch (hooks->begin(hooks->context, loop->next_piece, may_wait, &memory)) {
        case STX_LOAD_READY:
            break;
        case STX_LOAD_LATER:
            *later = true;
            return STX_OK;
        case STX_LOAD_STOP:
            loop->result->cancelled = true;
            return STX_OK;
        case STX_LOAD_FAILED:
            return stx_err_set(err, STX_ERR_MEMORY, "no memory to read into");
    }
    while (loop->works[index].is_used) index++;
    assert(index <= SLOTS_MAX);
    struct work *const work = &loop->works[index];
    const size_t reads_count = loop->job->pieces[loop->next_piece].reads_count;
    *work = (struct work){loop->next_piece++, reads_count, memory, true};
    loop->next_read = 0;
    if (reads_count == 0)
        finish_piece(loop, work);
    else
        loop->beginning = index;
    return STX_OK;
}

/* Send the next read of the piece being begun; false if it does not fit into the budget. */
static bool begin_read(struct loop *loop, enum stx_status *status, struct stx_err *err) {
    const struct work *const work = &loop->works[loop->beginning];
    const struct stx_load_piece *const piece = &loop->job->pieces[work->piece];
    assert(piece->read_first + loop->next_read < loop->job->reads_count);
    const struct stx_read *const read = &loop->job->reads[piece->read_first + loop->next_read];
    assert(read->begin_bytes < read->end_bytes && read->file_index < loop->job->files_count);
    assert(read->end_bytes <= loop->job->files[read->file_index].size_bytes);
    const uint64_t size_bytes = read->end_bytes - read->begin_bytes;
    if (loop->inflight_bytes != 0 && loop->inflight_bytes + size_bytes > loop->budget.bytes)
        return false;
    const uint32_t slot = loop->free[--loop->free_count];
    loop->requests[slot] =
        (struct request){.read = read, .at_bytes = read->begin_bytes, .work = loop->beginning};
    if (++loop->next_read == piece->reads_count) loop->beginning = NONE;
    *status = send(loop, slot, err);
    return true;
}

static enum stx_status fill(struct loop *loop, struct stx_err *err) {
    enum stx_status status = STX_OK;
    bool later = false;
    while (loop->again_count != 0) STX_TRY(send(loop, loop->again[--loop->again_count], err));
    while (status == STX_OK && loop->free_count != 0 && !later && !loop->result->cancelled) {
        if (loop->beginning != NONE) {
            if (!begin_read(loop, &status, err)) break;
        } else {
            if (loop->next_piece == loop->job->pieces_count) break;
            if (loop->inflight_bytes >= loop->budget.bytes) break;
            status = begin_piece(loop, &later, err);
        }
    }
    return status;
}

/* --- completions --- */

static void blame(struct loop *loop, const struct request *request, uint64_t offset_bytes) {
    loop->result->failed_file = request->read->file_index;
    loop->result->failed_offset_bytes = offset_bytes;
}

static void send_again(struct loop *loop, uint32_t slot) {
    loop->again[loop->again_count++] = slot;
}

static enum stx_status settle_failure(struct loop *loop, uint32_t slot, int failure,
                                      struct stx_err *err) {
    struct request *const request = &loop->requests[slot];
    uint8_t *const direct = &loop->directs[request->read->file_index];
    if ((failure == EINTR || failure == EAGAIN) && request->tries < TRIES_MAX) {
        if (++request->tries > TRIES_HASTY && failure == EAGAIN && loop->engine->outstanding == 0)
            (void)nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        send_again(loop, slot);
        return STX_OK;
    }
    if (request->is_direct && *direct != DIRECT_PROVEN &&
        (failure == EINVAL || failure == EOPNOTSUPP)) {
        *direct = DIRECT_REFUSED;
        send_again(loop, slot);
        return STX_OK;
    }
    char operation[64];
    (void)snprintf(operation, sizeof operation, "pread at byte %llu",
                   (unsigned long long)request->begin_bytes);
    blame(loop, request, request->begin_bytes);
    return stx_err_set_errno(err, failure, operation);
}

static void finish_read(struct loop *loop, uint32_t slot) {
    struct work *const work = &loop->works[loop->requests[slot].work];
    loop->free[loop->free_count++] = slot;
    if (--work->left == 0) finish_piece(loop, work);
}

static void record(const struct loop *loop, const struct request *request, int32_t result) {
    STX_TRACE(STX_TRACE_READ, request->sent_ns, loop->job->files[request->read->file_index].label,
              loop->result->engine, request->begin_bytes, request->size_bytes,
              result < 0 ? 0 : (uint64_t)result, request->sent_count - 1, request->is_direct,
              result < 0 ? (uint64_t)-result : 0);
}

static enum stx_status settle(struct loop *loop, const struct stx_io_done *done,
                              struct stx_err *err) {
    struct request *const request = &loop->requests[done->tag];
    loop->inflight_bytes -= request->size_bytes;
    record(loop, request, done->result);
    if (done->result < 0) return settle_failure(loop, done->tag, -done->result, err);
    const uint64_t got_bytes = (uint32_t)done->result;
    const uint64_t reached_bytes = request->begin_bytes + got_bytes;
    uint8_t *const direct = &loop->directs[request->read->file_index];
    assert(got_bytes <= request->size_bytes);
    loop->result->bytes_read += got_bytes;
    grow(&loop->budget, got_bytes);
    if (request->is_direct && got_bytes != 0) {
        loop->result->direct = true;
        if (*direct == DIRECT_UNTRIED) *direct = DIRECT_PROVEN;
    }
    if (reached_bytes >= request->read->end_bytes) {
        finish_read(loop, done->tag);
        return STX_OK;
    }
    if (got_bytes == 0) {
        blame(loop, request, reached_bytes);
        return stx_err_set(err, STX_ERR_IO, "file truncated at byte %llu",
                           (unsigned long long)reached_bytes);
    }
    /* A direct request that brought nothing new is at the last bytes of a shortened file, or the
     * file system has its whims: the page cache tells. */
    if (reached_bytes > request->at_bytes)
        request->at_bytes = reached_bytes;
    else
        request->needs_cache = true;
    send_again(loop, done->tag);
    return STX_OK;
}

/* --- the loop --- */

static void ask(struct loop *loop, bool at_once) {
    const struct stx_load_hooks *const hooks = &loop->job->hooks;
    const uint64_t now = now_ns();
    if (!at_once && now - loop->asked_ns < WAIT_MS * UINT64_C(1000000)) return;
    loop->asked_ns = now;
    if (!hooks->keep_going(hooks->context)) loop->result->cancelled = true;
}

static bool is_over(const struct loop *loop) {
    return loop->result->cancelled ||
           (loop->next_piece == loop->job->pieces_count && loop->beginning == NONE &&
            loop->free_count == loop->engine->depth);
}

static enum stx_status turn(struct loop *loop, struct stx_err *err) {
    struct stx_io_done done[SLOTS_MAX];
    uint32_t count = 0;
    STX_TRY(fill(loop, err));
    if (is_over(loop)) return STX_OK;
    if (loop->engine->outstanding != 0)
        STX_TRY(stx_engine_reap(loop->engine, done, SLOTS_MAX, WAIT_MS, &count, err));
    for (uint32_t i = 0; i < count; i++) STX_TRY(settle(loop, &done[i], err));
    ask(loop, count == 0);
    return STX_OK;
}

static void drain(struct stx_engine *engine) {
    struct stx_io_done done[SLOTS_MAX];
    struct stx_err ignored;
    uint32_t count;
    while (engine->outstanding != 0)
        if (stx_engine_reap(engine, done, SLOTS_MAX, WAIT_MS, &count, &ignored) != STX_OK) break;
}

static struct stx_load_result make_result(const char *engine) {
    return (struct stx_load_result){.engine = engine, .failed_file = STX_LOAD_NO_FILE};
}

enum stx_status stx_load_run_on(struct stx_engine *engine, const struct stx_load_job *job,
                                struct stx_load_result *result, struct stx_err *err) {
    assert(engine->outstanding == 0 && engine->depth != 0 && engine->depth <= SLOTS_MAX);
    enum stx_status status = STX_OK;
    const uint64_t begin_ns = stx_trace_begin();
    struct loop loop = {.job = job,
                        .engine = engine,
                        .result = result,
                        .beginning = NONE,
                        .asked_ns = now_ns(),
                        .budget = make_budget(job->limits.inflight_bytes)};
    *result = make_result(engine->ops->name);
    loop.directs = calloc((size_t)job->files_count + 1, sizeof *loop.directs);
    if (loop.directs == NULL) return stx_err_set(err, STX_ERR_MEMORY, "no memory for a load");
    for (uint32_t i = engine->depth; i != 0; i--) loop.free[loop.free_count++] = i - 1;
    while (status == STX_OK && !is_over(&loop)) status = turn(&loop, err);
    drain(engine);
    free(loop.directs);
    const uint32_t label = job->files_count == 0 ? 0 : job->files[0].label;
    if (status != STX_OK) stx_trace_error(label, result->failed_offset_bytes, err);
    STX_TRACE(STX_TRACE_ENGINE, begin_ns, label, result->engine, result->bytes_read,
              result->requests, result->retries, result->direct, result->cancelled,
              status != STX_OK);
    return status;
}

enum stx_status stx_load_run(const struct stx_load_job *job, struct stx_load_result *result,
                             struct stx_err *err) {
    const struct stx_engine_options options = {.kind = job->limits.engine,
                                               .threads_count = job->limits.threads_count};
    struct stx_engine engine;
    *result = make_result("none");
    STX_TRY(stx_engine_open(&engine, &options, err));
    const enum stx_status status = stx_load_run_on(&engine, job, result, err);
    stx_engine_close(&engine);
    return status;
}
