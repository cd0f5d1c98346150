/* SPDX-License-Identifier: Apache-2.0
 *
 * A piece of the load is what fits into one slot: a block of a large tensor, or many small ones.
 *
 * DESIGN. The plan is the one of owned memory with a slot as its block. The loop of load.c reads;
 * when a piece is done its copies are begun from there, and nobody waits for them before the slot
 * is needed again. What a copy answers is kept, and ends the load at the next piece.
 */
#include "transfer.h"

#include <stdlib.h>
#include <string.h>

#include "checked.h"
#include "trace.h"

#define SLOT_BYTES STX_STAGING_SLOT_BYTES
#define WAIT_MS 100
/* Below this the calling thread reads: an engine, and asking how to read, would cost more. */
#define SMALL_BYTES (UINT64_C(1) << 20)

struct work {
    const struct stx_transfer *transfer;
    struct stx_device *device;
    struct stx_plan plan;
    struct stx_load_piece *pieces;
    char **slots; /* of each piece, while it is read */
    size_t pieces_count;
    uint64_t copied_bytes;  /* copies of which were begun */
    enum stx_status status; /* of the device */
    struct stx_err err;
};

static bool is_small(const struct work *work) { return work->plan.bytes_read < SMALL_BYTES; }

/* --- what is read --- */

/* The plan knows headers: one whose tensors are the extents. */
static enum stx_status plan_extents(struct work *work, struct stx_err *err) {
    const struct stx_transfer *const transfer = work->transfer;
    const uint64_t begin_ns = stx_trace_begin();
    struct stx_tensor *tensors = calloc(transfer->extents_count + 1, sizeof *tensors);
    if (tensors == NULL) return stx_err_set(err, STX_ERR_MEMORY, "no memory for a plan");
    for (size_t i = 0; i < transfer->extents_count; i++) {
        tensors[i].begin = transfer->extents[i].begin_bytes;
        tensors[i].end = transfer->extents[i].end_bytes;
    }
    const struct stx_header header = {.tensors = tensors,
                                      .tensors_count = transfer->extents_count,
                                      .file_size_bytes = transfer->file->identity.size_bytes};
    const struct stx_plan_input input = {.header = &header};
    const struct stx_plan_limits limits = {.gap_bytes = STX_OWNED_GAP_BYTES,
                                           .align_bytes = STX_LOAD_ALIGN_BYTES,
                                           .block_bytes = SLOT_BYTES};
    const enum stx_status status = stx_plan_build(&work->plan, &input, 1, &limits, err);
    free(tensors);
    STX_TRACE(STX_TRACE_PLAN, begin_ns, transfer->file->label, NULL, work->plan.spans_count,
              work->plan.reads_count, work->plan.bytes_kept, work->plan.bytes_read);
    return status;
}

/* Fill slots with reads, in order: each lands where the one before it ends, aligned. */
static enum stx_status cut(struct work *work, struct stx_err *err) {
    struct stx_plan *const plan = &work->plan;
    uint64_t filled_bytes = SLOT_BYTES;
    work->pieces = calloc(plan->reads_count + 1, sizeof *work->pieces);
    work->slots = calloc(plan->reads_count + 1, sizeof *work->slots);
    if (work->pieces == NULL || work->slots == NULL)
        return stx_err_set(err, STX_ERR_MEMORY, "no memory for a load");
    for (size_t i = 0; i < plan->reads_count; i++) {
        struct stx_read *const read = &plan->reads[i];
        const uint64_t size_bytes =
            stx_align_up(read->end_bytes - read->begin_bytes, STX_LOAD_ALIGN_BYTES);
        if (filled_bytes + size_bytes > SLOT_BYTES) {
            work->pieces[work->pieces_count++] = (struct stx_load_piece){.read_first = i};
            filled_bytes = 0;
        }
        work->pieces[work->pieces_count - 1].reads_count++;
        read->memory_bytes = filled_bytes;
        filled_bytes += size_bytes;
    }
    return STX_OK;
}

/* --- what is copied --- */

/* The first extent that ends behind `offset_bytes`. */
static size_t find_extent(const struct stx_transfer *transfer, uint64_t offset_bytes) {
    size_t first = 0, behind = transfer->extents_count;
    while (first < behind) {
        const size_t middle = first + (behind - first) / 2;
        if (transfer->extents[middle].end_bytes > offset_bytes)
            behind = middle;
        else
            first = middle + 1;
    }
    return first;
}

static enum stx_status copy_read(struct work *work, const struct stx_read *read, const char *slot,
                                 struct stx_err *err) {
    const struct stx_transfer *const transfer = work->transfer;
    for (size_t i = find_extent(transfer, read->begin_bytes);
         i < transfer->extents_count && transfer->extents[i].begin_bytes < read->end_bytes; i++) {
        const struct stx_extent *const extent = &transfer->extents[i];
        const uint64_t begin = stx_max_u64(extent->begin_bytes, read->begin_bytes);
        const uint64_t end = stx_min_u64(extent->end_bytes, read->end_bytes);
        STX_TRY(work->device->ops->copy(
            work->device, extent->target + (begin - extent->begin_bytes),
            slot + read->memory_bytes + (begin - read->begin_bytes), (size_t)(end - begin), err));
        work->copied_bytes += end - begin;
    }
    return STX_OK;
}

static void keep_failure(struct work *work, enum stx_status status, const struct stx_err *err) {
    if (status == STX_OK || work->status != STX_OK) return;
    work->status = status;
    work->err = *err;
}

/* --- the hooks of the loop --- */

static enum stx_load_next begin_piece(void *context, size_t piece, bool may_wait, char **memory) {
    struct work *const work = context;
    struct stx_err err;
    if (work->status != STX_OK) return STX_LOAD_STOP;
    keep_failure(work,
                 stx_staging_take(work->transfer->staging, may_wait ? WAIT_MS : 0, memory, &err),
                 &err);
    if (work->status != STX_OK) return STX_LOAD_STOP;
    work->slots[piece] = *memory;
    return *memory == NULL ? STX_LOAD_LATER : STX_LOAD_READY;
}

static void piece_is_done(void *context, size_t index) {
    struct work *const work = context;
    const struct stx_load_piece *const piece = &work->pieces[index];
    char *const slot = work->slots[index];
    const uint64_t begin_ns = stx_trace_begin(), before_bytes = work->copied_bytes;
    struct stx_err err;
    work->slots[index] = NULL;
    for (size_t i = 0; i < piece->reads_count && work->status == STX_OK; i++)
        keep_failure(work, copy_read(work, &work->plan.reads[piece->read_first + i], slot, &err),
                     &err);
    const uint64_t size_bytes = work->copied_bytes - before_bytes;
    keep_failure(work, stx_staging_send(work->transfer->staging, slot, size_bytes, &err), &err);
    STX_TRACE(STX_TRACE_COPY, begin_ns, work->transfer->file->label, work->device->ops->name,
              work->plan.reads[piece->read_first].begin_bytes, piece->reads_count, size_bytes);
}

static bool keep_going(void *context) {
    const struct work *const work = context;
    const struct stx_owned_patience *const patience = work->transfer->patience;
    return work->status == STX_OK && patience->keep_going(patience->context);
}

/* --- the load --- */

/* One read after the other, by the calling thread. */
static enum stx_status read_plainly(struct work *work, struct stx_load_result *result,
                                    struct stx_err *err) {
    for (size_t i = 0; i < work->pieces_count; i++) {
        enum stx_load_next next = STX_LOAD_LATER;
        while (next == STX_LOAD_LATER) {
            char *memory;
            if (!keep_going(work)) result->cancelled = true;
            if (result->cancelled) return STX_OK;
            next = begin_piece(work, i, true, &memory);
        }
        if (next == STX_LOAD_STOP) return STX_OK;
        for (size_t j = 0; j < work->pieces[i].reads_count; j++) {
            const struct stx_read *const read = &work->plan.reads[work->pieces[i].read_first + j];
            STX_TRY(stx_owned_read_one(work->transfer->file, work->slots[i] + read->memory_bytes,
                                       read->begin_bytes, read->end_bytes, result, err));
        }
        piece_is_done(work, i);
    }
    return STX_OK;
}

/* The slots of pieces that were begun and not done. */
static void give_back(struct work *work) {
    for (size_t i = 0; i < work->pieces_count; i++) {
        if (work->slots[i] != NULL) stx_staging_give_back(work->transfer->staging, work->slots[i]);
        work->slots[i] = NULL;
    }
}

static enum stx_status read_all(struct work *work, struct stx_load_result *result,
                                const struct stx_owned_way *way, struct stx_err *err) {
    const struct stx_load_job job = {.files = &way->load_file,
                                     .reads = work->plan.reads,
                                     .pieces = work->pieces,
                                     .files_count = 1,
                                     .reads_count = work->plan.reads_count,
                                     .pieces_count = work->pieces_count,
                                     .hooks = {.context = work,
                                               .begin = begin_piece,
                                               .done = piece_is_done,
                                               .keep_going = keep_going},
                                     .limits = way->limits};
    enum stx_status status = STX_OK;
    bool plainly = is_small(work);
    if (!plainly) {
        status = stx_owned_run(&job, result, err);
        give_back(work);
        plainly = status == STX_ERR_IO && result->failed_file == STX_LOAD_NO_FILE; /* no engine */
    }
    if (plainly) status = read_plainly(work, result, err);
    give_back(work);
    return status;
}

/* The copies happen after what the caller's stream has to do; and when this returns they have
 * happened, or never will. */
static enum stx_status run_in_order(struct work *work, struct stx_load_result *result,
                                    const struct stx_owned_way *way, struct stx_err *err) {
    struct stx_device *const device = work->device;
    void *mark = NULL;
    STX_TRY(device->ops->mark_init(device, &mark, err));
    enum stx_status status = device->ops->copies_follow(device, work->transfer->stream, mark, err);
    if (status == STX_OK) {
        status = read_all(work, result, way, err);
        struct stx_err late;
        keep_failure(work, stx_staging_drain(work->transfer->staging, mark, &late), &late);
    }
    device->ops->mark_free(device, mark);
    if (status == STX_OK && work->status != STX_OK) {
        *err = work->err;
        status = work->status;
    }
    return status;
}

enum stx_status stx_transfer_run(const struct stx_transfer *transfer,
                                 struct stx_load_result *result, struct stx_owned_way *way,
                                 struct stx_err *err) {
    struct work work = {.transfer = transfer, .device = stx_staging_device(transfer->staging)};
    int before = 0;
    *result = (struct stx_load_result){.engine = NULL, .failed_file = STX_LOAD_NO_FILE};
    *way = (struct stx_owned_way){.load_file = {.fd = -1, .direct_fd = -1, .size_bytes = 0}};
    if (transfer->extents_count == 0) return STX_OK;
    enum stx_status status = plan_extents(&work, err);
    if (status == STX_OK) status = cut(&work, err);
    if (status == STX_OK) status = work.device->ops->enter(work.device, &before, err);
    if (status == STX_OK) {
        if (!is_small(&work))
            stx_owned_way_open(way, transfer->file, work.plan.reads, work.plan.reads_count,
                               transfer->options);
        status = run_in_order(&work, result, way, err);
        stx_owned_way_close(way);
        work.device->ops->leave(work.device, before);
    }
    if (status == STX_ERR_DEVICE) stx_trace_error(transfer->file->label, 0, err);
    stx_plan_free(&work.plan);
    free(work.pieces);
    free(work.slots);
    return status;
}
