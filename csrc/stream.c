/* SPDX-License-Identifier: Apache-2.0
 *
 * Streams.
 *
 * DESIGN. The tensors are cut into pieces of about an eighth of the window, at tensor borders; each
 * is an input of one plan and gets a block of memory of its own when its turn comes. The loop of
 * load.c runs in the stream's thread; its hooks and the consumer meet under one lock. A piece
 * counts against the window from the moment its memory is made until the consumer asks for the next
 * one, so that a consumer who drops what it was given holds the window and one piece at most.
 */
#include "stream.h"

#include <assert.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "checked.h"
#include "thread.h"
#include "trace.h"

#define PIECES_IN_WINDOW 8

struct piece {
    uint32_t tensor_first;
    uint32_t tensors_count;
    size_t read_first;
    size_t reads_count;
    uint64_t memory_bytes;
    struct stx_arena *arena; /* from its beginning until the consumer takes it */
    bool ready;
};

struct stx_stream {
    struct stx_file file;
    struct stx_plan plan;
    struct stx_load_piece *load_pieces;
    struct piece *pieces;
    size_t pieces_count;
    uint64_t window_bytes;
    struct stx_owned_way way;
    pthread_t thread;
    bool started; /* and not joined */

    pthread_mutex_t lock; /* guards what follows, and the pieces' arenas and flags */
    pthread_cond_t change;
    size_t taken_count;  /* pieces the consumer has taken */
    uint64_t held_bytes; /* of pieces begun and not given back */
    bool alone;          /* no thread reads: the consumer does */
    bool stopping;
    bool finished;
    enum stx_status status;
    struct stx_load_result result;
    struct stx_err err;
};

/* --- cutting --- */

/* The memory that kept tensor `i` adds to a piece whose last one ends in memory at `*end_bytes` of
 * the data (0: it has none): whole alignment units, a small hole before it included. */
static uint64_t memory_of(const struct stx_header *header, uint32_t i, uint64_t *end_bytes) {
    const struct stx_tensor *const tensor = &header->tensors[i];
    if (tensor->begin == tensor->end) return 0;
    const uint64_t begin =
        stx_align_down(header->data_begin_bytes + tensor->begin, STX_LOAD_ALIGN_BYTES);
    const uint64_t end = stx_align_up(header->data_begin_bytes + tensor->end, STX_LOAD_ALIGN_BYTES);
    const bool is_joined = *end_bytes != 0 && begin <= *end_bytes + STX_OWNED_GAP_BYTES;
    const uint64_t size_bytes = end - (is_joined ? *end_bytes : begin);
    *end_bytes = end;
    return size_bytes;
}

/* Cut the tensors from `first` on into pieces of about as much memory. `pieces` has room for one
 * per tensor, or is NULL to count. */
static size_t cut(const struct stx_header *header, const uint8_t *keep, uint32_t first,
                  uint64_t piece_bytes, struct piece *pieces) {
    size_t count = 0;
    uint64_t size_bytes = 0, end_bytes = 0;
    uint32_t begin = first;
    const uint32_t end = (uint32_t)header->tensors_count;
    for (uint32_t i = first; i < end; i++) {
        if (keep != NULL && keep[i] == 0) continue;
        uint64_t more_bytes = memory_of(header, i, &end_bytes);
        if (i > begin && size_bytes != 0 && size_bytes + more_bytes > piece_bytes) {
            if (pieces != NULL)
                pieces[count] = (struct piece){.tensor_first = begin, .tensors_count = i - begin};
            count++;
            begin = i;
            size_bytes = end_bytes = 0;
            more_bytes = memory_of(header, i, &end_bytes);
        }
        size_bytes += more_bytes;
    }
    if (begin == end) return count;
    if (pieces != NULL)
        pieces[count] = (struct piece){.tensor_first = begin, .tensors_count = end - begin};
    return count + 1;
}

/* One plan with a piece per input; the reads of each piece, and its memory. */
static enum stx_status plan_pieces(struct stx_stream *stream, const struct stx_header *header,
                                   const uint8_t *keep, struct stx_err *err) {
    const struct stx_plan_limits limits = stx_owned_limits(header->file_size_bytes);
    const uint64_t begin_ns = stx_trace_begin();
    struct stx_plan_input *inputs = calloc(stream->pieces_count + 1, sizeof *inputs);
    if (inputs == NULL) return stx_err_set(err, STX_ERR_MEMORY, "no memory for a plan");
    for (size_t i = 0; i < stream->pieces_count; i++)
        inputs[i] = (struct stx_plan_input){.header = header,
                                            .keep = keep,
                                            .tensor_first = stream->pieces[i].tensor_first,
                                            .tensors_count = stream->pieces[i].tensors_count};
    const enum stx_status status =
        stx_plan_build(&stream->plan, inputs, (uint32_t)stream->pieces_count, &limits, err);
    free(inputs);
    if (status != STX_OK) return status;
    size_t at = 0;
    for (size_t i = 0; i < stream->pieces_count; i++) {
        struct piece *piece = &stream->pieces[i];
        piece->read_first = at;
        while (at < stream->plan.reads_count && stream->plan.reads[at].file_index == i)
            stream->plan.reads[at++].file_index = 0; /* there is one file */
        piece->reads_count = at - piece->read_first;
        piece->memory_bytes = stx_plan_memory_bytes(&stream->plan.reads[piece->read_first],
                                                    piece->reads_count, STX_LOAD_ALIGN_BYTES);
        stream->load_pieces[i] = (struct stx_load_piece){.read_first = piece->read_first,
                                                         .reads_count = piece->reads_count};
        stream->window_bytes = stx_max_u64(stream->window_bytes, piece->memory_bytes);
    }
    STX_TRACE(STX_TRACE_PLAN, begin_ns, stream->file.label, NULL, stream->plan.spans_count,
              stream->plan.reads_count, stream->plan.bytes_kept, stream->plan.bytes_read);
    return STX_OK;
}

/* --- the reading thread --- */

static enum stx_load_next begin_piece(void *context, size_t index, bool may_wait, char **memory) {
    struct stx_stream *const stream = context;
    struct piece *const piece = &stream->pieces[index];
    const struct timespec until = stx_thread_deadline(CLOCK_MONOTONIC, 100);
    const uint64_t begin_ns = stx_trace_begin();
    struct stx_err ignored;
    (void)pthread_mutex_lock(&stream->lock);
    bool fits = false;
    int waits = 0;
    for (; !stream->stopping; waits++) {
        fits = stream->held_bytes + piece->memory_bytes <= stream->window_bytes;
        if (fits || !may_wait || waits == 100 ||
            pthread_cond_timedwait(&stream->change, &stream->lock, &until) != 0)
            break;
    }
    const bool stopping = stream->stopping;
    if (fits) stream->held_bytes += piece->memory_bytes;
    (void)pthread_mutex_unlock(&stream->lock);
    if (waits != 0 || (may_wait && !fits))
        STX_TRACE(STX_TRACE_WAIT, begin_ns, stream->file.label, "room", 0);
    if (stopping) return STX_LOAD_STOP;
    if (!fits) return STX_LOAD_LATER;
    if (stx_arena_open(&piece->arena, piece->memory_bytes, &ignored) != STX_OK)
        return STX_LOAD_FAILED;
    stx_arena_populate(piece->arena, 0, piece->memory_bytes);
    *memory = stx_arena_bytes(piece->arena);
    return STX_LOAD_READY;
}

static void piece_is_done(void *context, size_t index) {
    struct stx_stream *const stream = context;
    (void)pthread_mutex_lock(&stream->lock);
    stream->pieces[index].ready = true;
    (void)pthread_cond_broadcast(&stream->change);
    (void)pthread_mutex_unlock(&stream->lock);
}

static bool keep_going(void *context) {
    struct stx_stream *const stream = context;
    (void)pthread_mutex_lock(&stream->lock);
    const bool stopping = stream->stopping;
    (void)pthread_mutex_unlock(&stream->lock);
    return !stopping;
}

static void *read_all(void *argument) {
    struct stx_stream *const stream = argument;
    struct stx_load_result result;
    struct stx_err err = {.status = STX_OK};
    const struct stx_load_job job = {.files = &stream->way.load_file,
                                     .reads = stream->plan.reads,
                                     .pieces = stream->load_pieces,
                                     .files_count = 1,
                                     .reads_count = stream->plan.reads_count,
                                     .pieces_count = stream->pieces_count,
                                     .hooks = {.context = stream,
                                               .begin = begin_piece,
                                               .done = piece_is_done,
                                               .keep_going = keep_going},
                                     .limits = stream->way.limits};
    const enum stx_status status = stx_owned_run(&job, &result, &err);
    (void)pthread_mutex_lock(&stream->lock);
    stream->status = status;
    stream->err = err;
    stream->result = result;
    stream->finished = true;
    stream->alone = status == STX_ERR_IO && result.failed_file == STX_LOAD_NO_FILE; /* no engine */
    (void)pthread_cond_broadcast(&stream->change);
    (void)pthread_mutex_unlock(&stream->lock);
    return NULL;
}

/* --- the consumer --- */

static void release(struct stx_stream *stream) {
    for (size_t i = 0; stream->pieces != NULL && i < stream->pieces_count; i++)
        stx_arena_release(stream->pieces[i].arena);
    stx_owned_way_close(&stream->way);
    stx_file_close(&stream->file);
    stx_plan_free(&stream->plan);
    free(stream->pieces);
    free(stream->load_pieces);
    free(stream);
}

enum stx_status stx_stream_open(struct stx_stream **stream, struct stx_file *file,
                                const struct stx_header *header, const uint8_t *keep,
                                uint32_t tensor_first, const struct stx_owned_options *options,
                                uint64_t window_bytes, struct stx_err *err) {
    const uint64_t piece_bytes = window_bytes / PIECES_IN_WINDOW;
    struct stx_stream *opened = calloc(1, sizeof *opened);
    if (opened == NULL) {
        stx_file_close(file);
        return stx_err_set(err, STX_ERR_MEMORY, "no memory for a stream");
    }
    opened->file = *file;
    file->fd = -1;
    opened->way.load_file.direct_fd = -1;
    opened->window_bytes = window_bytes;
    opened->pieces_count = cut(header, keep, tensor_first, piece_bytes, NULL);
    opened->pieces = calloc(opened->pieces_count + 1, sizeof *opened->pieces);
    opened->load_pieces = calloc(opened->pieces_count + 1, sizeof *opened->load_pieces);
    enum stx_status status = STX_OK;
    if (opened->pieces == NULL || opened->load_pieces == NULL) {
        status = stx_err_set(err, STX_ERR_MEMORY, "no memory for a stream");
        goto out;
    }
    (void)cut(header, keep, tensor_first, piece_bytes, opened->pieces);
    status = plan_pieces(opened, header, keep, err);
    if (status != STX_OK) goto out;
    stx_owned_way_open(&opened->way, &opened->file, opened->plan.reads, opened->plan.reads_count,
                       options);
    (void)pthread_mutex_init(&opened->lock, NULL);
    stx_thread_condition_init(&opened->change);
    /* Where no thread is to be had, the consumer reads its pieces itself. */
    opened->started = stx_thread_start(&opened->thread, read_all, opened) == 0;
    if (!opened->started) opened->alone = true; /* else it is the thread's to say */
out:
    if (status != STX_OK) release(opened);
    if (status == STX_OK) *stream = opened;
    return status;
}

/* The piece before the next one to be taken is the consumer's no more. With the lock held. */
static void give_back(struct stx_stream *stream) {
    if (stream->taken_count == 0) return;
    struct piece *const before = &stream->pieces[stream->taken_count - 1];
    stream->held_bytes -= stx_min_u64(before->memory_bytes, stream->held_bytes);
    before->memory_bytes = 0;
    (void)pthread_cond_broadcast(&stream->change);
}

/* Without a thread or an engine: read a piece here. */
static enum stx_status read_piece(struct stx_stream *stream, struct piece *piece,
                                  struct stx_err *err) {
    stx_arena_release(piece->arena);
    piece->arena = NULL;
    STX_TRY(stx_arena_open(&piece->arena, piece->memory_bytes, err));
    STX_TRY(stx_owned_read_plainly(&stream->file, &stream->plan.reads[piece->read_first],
                                   piece->reads_count, piece->arena, &stream->result, err));
    piece->ready = true;
    return STX_OK;
}

enum stx_status stx_stream_next(struct stx_stream *stream, uint32_t timeout_ms,
                                struct stx_stream_piece *piece, bool *ready,
                                uint64_t *failed_offset_bytes, struct stx_err *err) {
    const struct timespec until = stx_thread_deadline(CLOCK_MONOTONIC, timeout_ms);
    enum stx_status status = STX_OK;
    *ready = false;
    (void)pthread_mutex_lock(&stream->lock);
    give_back(stream);
    const bool is_end = stream->taken_count == stream->pieces_count;
    struct piece *const next = &stream->pieces[stream->taken_count];
    while (!stream->alone && !is_end && !next->ready && !stream->finished)
        if (pthread_cond_timedwait(&stream->change, &stream->lock, &until) != 0) break;
    if (stream->alone && !is_end && !next->ready) {
        status = read_piece(stream, next, err);
        *failed_offset_bytes = stream->result.failed_offset_bytes;
    }
    if (is_end) {
        *piece = (struct stx_stream_piece){.arena = NULL};
        *ready = true;
    } else if (next->ready) {
        *piece = (struct stx_stream_piece){.arena = next->arena,
                                           .reads = &stream->plan.reads[next->read_first],
                                           .reads_count = next->reads_count,
                                           .tensor_first = next->tensor_first,
                                           .tensors_count = next->tensors_count};
        next->arena = NULL;
        stream->taken_count++;
        *ready = true;
    } else if (stream->finished && !stream->alone) {
        *err = stream->err;
        *failed_offset_bytes = stream->result.failed_offset_bytes;
        status = stream->status != STX_OK
                     ? stream->status
                     : stx_err_set(err, STX_ERR_UNSUPPORTED, "the stream was closed");
    }
    (void)pthread_mutex_unlock(&stream->lock);
    return status;
}

const struct stx_file *stx_stream_file(const struct stx_stream *stream) { return &stream->file; }

void stx_stream_stop(struct stx_stream *stream) {
    if (!stream->started) return;
    (void)pthread_mutex_lock(&stream->lock);
    stream->stopping = true;
    (void)pthread_cond_broadcast(&stream->change);
    (void)pthread_mutex_unlock(&stream->lock);
    (void)pthread_join(stream->thread, NULL);
    stream->started = false;
}

struct stx_load_result stx_stream_result(const struct stx_stream *stream, uint64_t *wanted_bytes,
                                         struct stx_owned_way *way) {
    *wanted_bytes = stream->plan.bytes_kept;
    *way = stream->way;
    return stream->result;
}

void stx_stream_close(struct stx_stream *stream) {
    if (stream == NULL) return;
    stx_stream_stop(stream);
    (void)pthread_cond_destroy(&stream->change);
    (void)pthread_mutex_destroy(&stream->lock);
    release(stream);
}

void stx_stream_abandon(struct stx_stream *stream) {
    if (stream != NULL) release(stream);
}
