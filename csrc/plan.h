/* SPDX-License-Identifier: Apache-2.0
 *
 * What will be read, decided before anything is: headers, a keep mask and limits become spans,
 * reads and totals.
 *
 * Pure: no I/O, no Python, no clock. A function of its inputs alone, so every rank that sees the
 * same headers and the same filter has the same plan. Guarantees: every kept byte lies in exactly
 * one span and one read; spans and reads ascend per file and never overlap; a hole wider than the
 * gap limit plus alignment is in no read.
 */
#ifndef STX_PLAN_H
#define STX_PLAN_H

#include <stddef.h>
#include <stdint.h>

#include "err.h"
#include "header.h"

/* One file of a plan, or a part of one. Borrowed during stx_plan_build only. */
struct stx_plan_input {
    const struct stx_header *header;
    const uint8_t *keep;    /* tensors_count flags in offset order; NULL keeps all */
    uint32_t tensor_first;  /* only tensors from this one on, */
    uint32_t tensors_count; /* and of these as many; 0: all */
};

struct stx_plan_limits {
    uint64_t gap_bytes;   /* kept neighbours this far apart or closer are read as one */
    uint64_t align_bytes; /* reads begin and end at its multiples; a power of two, 1 for none */
    uint64_t block_bytes; /* reads are cut at its multiples; a power of two >= align_bytes */
};

/* A run of kept tensors of one file; offsets are in the file, exact. Empty tensors are in none. */
struct stx_span {
    uint64_t begin_bytes;
    uint64_t end_bytes;
    uint32_t file_index;
    uint32_t tensor_first; /* index of its first kept tensor */
    uint32_t tensor_count; /* kept tensors in it */
};

/* One request: offsets in the file, aligned, clipped to the file's size. */
struct stx_read {
    uint64_t begin_bytes;
    uint64_t end_bytes;
    uint32_t file_index;
    uint64_t memory_bytes; /* where it lands: offset from the memory of its input */
};

/* Caller-owned; a zeroed struct is an empty plan. */
struct stx_plan {
    struct stx_span *spans;
    size_t spans_count;
    struct stx_read *reads;
    size_t reads_count;
    uint64_t tensors_kept;
    uint64_t bytes_kept; /* sum of the kept tensors' sizes */
    uint64_t bytes_read; /* sum of the reads' sizes */
};

/* Where the byte at `offset_bytes` of the file lands in the memory of a piece, whose `reads` hold
 * it. Bytes that are neighbours in the file and in the plan are neighbours there. */
uint64_t stx_plan_place(const struct stx_read *reads, size_t reads_count, uint64_t offset_bytes);

/* The memory that the reads of a piece need, with room to round the last one up to the alignment.
 */
uint64_t stx_plan_memory_bytes(const struct stx_read *reads, size_t reads_count,
                               uint64_t align_bytes);

/* Build the plan for `inputs_count` files. On error `plan` is left empty. Errors: STX_ERR_MEMORY.
 */
enum stx_status stx_plan_build(struct stx_plan *plan, const struct stx_plan_input *inputs,
                               uint32_t inputs_count, const struct stx_plan_limits *limits,
                               struct stx_err *err) STX_NODISCARD;

/* Release everything and leave an empty plan. */
void stx_plan_free(struct stx_plan *plan);

#endif
