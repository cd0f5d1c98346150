/* SPDX-License-Identifier: Apache-2.0
 *
 * Builds plans. First the kept tensors of each file are joined into spans, in offset order; then
 * each span is rounded out to the alignment, cut at block boundaries of the file, and clipped so
 * that two spans which share an edge block read it once.
 */
#include "plan.h"

#include <assert.h>
#include <stdlib.h>

#include "array.h"
#include "checked.h"

struct growth {
    size_t spans_capacity;
    size_t reads_capacity;
};

static enum stx_status fail_memory(struct stx_err *err) {
    return stx_err_set(err, STX_ERR_MEMORY, "no memory for a plan");
}

static enum stx_status add_spans(struct stx_plan *plan, struct growth *growth, uint32_t file_index,
                                 const struct stx_plan_input *input, uint64_t gap_bytes,
                                 struct stx_err *err) {
    const struct stx_header *header = input->header;
    struct stx_span *open = NULL; /* this file's last span */
    const size_t end = input->tensors_count == 0
                           ? header->tensors_count
                           : (size_t)input->tensor_first + input->tensors_count;
    for (size_t i = input->tensor_first; i < end; i++) {
        const struct stx_tensor *tensor = &header->tensors[i];
        if (input->keep != NULL && input->keep[i] == 0) continue;
        plan->tensors_kept++;
        plan->bytes_kept += tensor->end - tensor->begin;
        if (tensor->end == tensor->begin) continue;
        const uint64_t begin_bytes = header->data_begin_bytes + tensor->begin;
        const uint64_t end_bytes = header->data_begin_bytes + tensor->end;
        if (open != NULL && begin_bytes - open->end_bytes <= gap_bytes) {
            open->end_bytes = end_bytes;
            open->tensor_count++;
            continue;
        }
        if (!stx_array_reserve((void **)&plan->spans, &growth->spans_capacity, plan->spans_count,
                               sizeof *plan->spans))
            return fail_memory(err);
        open = &plan->spans[plan->spans_count++];
        *open = (struct stx_span){.begin_bytes = begin_bytes,
                                  .end_bytes = end_bytes,
                                  .file_index = file_index,
                                  .tensor_first = (uint32_t)i,
                                  .tensor_count = 1};
    }
    return STX_OK;
}

/* The reads of one span; `*covered_bytes` is the file offset up to which reads exist already. */
static enum stx_status add_reads(struct stx_plan *plan, struct growth *growth,
                                 const struct stx_span *span, uint64_t file_size_bytes,
                                 const struct stx_plan_limits *limits, uint64_t *covered_bytes,
                                 uint64_t *memory_bytes, struct stx_err *err) {
    uint64_t at =
        stx_max_u64(stx_align_down(span->begin_bytes, limits->align_bytes), *covered_bytes);
    const uint64_t end =
        stx_min_u64(stx_align_up(span->end_bytes, limits->align_bytes), file_size_bytes);
    while (at < end) {
        const uint64_t block_end = stx_align_down(at, limits->block_bytes) + limits->block_bytes;
        const uint64_t read_end = stx_min_u64(block_end, end);
        if (!stx_array_reserve((void **)&plan->reads, &growth->reads_capacity, plan->reads_count,
                               sizeof *plan->reads))
            return fail_memory(err);
        plan->reads[plan->reads_count++] = (struct stx_read){.begin_bytes = at,
                                                             .end_bytes = read_end,
                                                             .file_index = span->file_index,
                                                             .memory_bytes = *memory_bytes};
        *memory_bytes += stx_align_up(read_end - at, limits->align_bytes);
        plan->bytes_read += read_end - at;
        at = read_end;
    }
    *covered_bytes = stx_max_u64(end, *covered_bytes);
    return STX_OK;
}

static enum stx_status build_file(struct stx_plan *plan, struct growth *growth, uint32_t file_index,
                                  const struct stx_plan_input *input,
                                  const struct stx_plan_limits *limits, struct stx_err *err) {
    const size_t span_first = plan->spans_count;
    uint64_t covered_bytes = 0, memory_bytes = 0;
    STX_TRY(add_spans(plan, growth, file_index, input, limits->gap_bytes, err));
    for (size_t i = span_first; i < plan->spans_count; i++)
        STX_TRY(add_reads(plan, growth, &plan->spans[i], input->header->file_size_bytes, limits,
                          &covered_bytes, &memory_bytes, err));
    return STX_OK;
}

enum stx_status stx_plan_build(struct stx_plan *plan, const struct stx_plan_input *inputs,
                               uint32_t inputs_count, const struct stx_plan_limits *limits,
                               struct stx_err *err) {
    assert(limits->align_bytes != 0 && limits->block_bytes >= limits->align_bytes);
    struct growth growth = {0, 0};
    enum stx_status status = STX_OK;
    *plan = (struct stx_plan){0};
    for (uint32_t i = 0; i < inputs_count && status == STX_OK; i++)
        status = build_file(plan, &growth, i, &inputs[i], limits, err);
    if (status != STX_OK) stx_plan_free(plan);
    return status;
}

uint64_t stx_plan_place(const struct stx_read *reads, size_t reads_count, uint64_t offset_bytes) {
    size_t first = 0, behind = reads_count;
    while (behind - first > 1) { /* the last read that begins at or before the offset */
        const size_t middle = first + (behind - first) / 2;
        if (reads[middle].begin_bytes <= offset_bytes) first = middle;
        if (reads[middle].begin_bytes > offset_bytes) behind = middle;
    }
    assert(reads_count != 0 && reads[first].begin_bytes <= offset_bytes &&
           offset_bytes < reads[first].end_bytes);
    return reads[first].memory_bytes + (offset_bytes - reads[first].begin_bytes);
}

uint64_t stx_plan_memory_bytes(const struct stx_read *reads, size_t reads_count,
                               uint64_t align_bytes) {
    if (reads_count == 0) return 0;
    const struct stx_read *last = &reads[reads_count - 1];
    return last->memory_bytes + stx_align_up(last->end_bytes - last->begin_bytes, align_bytes);
}

void stx_plan_free(struct stx_plan *plan) {
    free(plan->spans);
    free(plan->reads);
    *plan = (struct stx_plan){0};
}
