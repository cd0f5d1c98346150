/* SPDX-License-Identifier: Apache-2.0
 *
 * What a consumer will want next: watches which tensors it asks for, recognises the order, and
 * gives out what lies ahead of it, as far as the consumer has earned it.
 *
 * Pure: no I/O, no threads, no clock. Guarantees: a byte is given out at most once; never more than
 * `limit_bytes` lie between the consumer and what was given out; a consumer that jumps about is
 * given nothing beyond what it asks for, and one that leaves its order costs at most what it had
 * read in order before, twice, and STX_FOLLOW_FLOOR_BYTES.
 */
#ifndef STX_FOLLOW_H
#define STX_FOLLOW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "err.h"

/* A run of bytes: offsets in a file. Empty where begin is end. */
struct stx_range {
    uint64_t begin_bytes;
    uint64_t end_bytes;
};

/* The orders a consumer may follow: that of the file, and two more. */
#define STX_FOLLOW_ORDERS 3
/* Given out ahead of a consumer that has just shown its order. */
#define STX_FOLLOW_FLOOR_BYTES (UINT64_C(4) << 20)

/* What has become of a tensor: given out ahead, or asked for. */
enum { STX_FOLLOW_GIVEN = 1, STX_FOLLOW_DEMANDED = 2 };

/* One order and where the consumer is in it. */
struct stx_follow_order {
    uint32_t *indexes; /* place -> tensor; NULL for the file's order, where they are equal */
    uint32_t *places;  /* tensor -> place */
    size_t front;      /* one behind the furthest place the consumer has reached */
    size_t run_count;  /* steps forward in a row */
    bool exists;
};

/* Caller-owned; a zeroed struct is an empty one. */
struct stx_follow {
    struct stx_range *tensors;
    uint8_t *taken; /* 0, or one of the two below */
    size_t count;
    struct stx_follow_order orders[STX_FOLLOW_ORDERS];
    unsigned current;      /* the order that is followed */
    size_t cursor;         /* its next place to give out */
    uint64_t given_bytes;  /* of the tensor at the cursor: given out already */
    uint64_t ahead_bytes;  /* given out and not reached by the consumer */
    uint64_t window_bytes; /* ahead_bytes may grow up to here */
    uint64_t earned_bytes; /* asked for in order, since the order was last left */
    uint64_t limit_bytes;
    bool demanded; /* something was asked for */
};

/* All of `tensors`, in their order, for a consumer that nobody sees. `tensors` is moved, also on
 * failure: freed with free(). Errors: STX_ERR_MEMORY. */
enum stx_status stx_follow_init_all(struct stx_follow *follow, struct stx_range *tensors,
                                    size_t count, uint64_t limit_bytes,
                                    struct stx_err *err) STX_NODISCARD;

/* For a consumer that asks for one tensor after the other. `tensors` in file order, an empty range
 * for one that is not to be read; `others` are permutations of their indexes, or NULL. All are
 * moved, also on failure. Errors: STX_ERR_MEMORY. */
enum stx_status stx_follow_init(struct stx_follow *follow, struct stx_range *tensors, size_t count,
                                uint32_t *others[STX_FOLLOW_ORDERS - 1], uint64_t limit_bytes,
                                struct stx_err *err) STX_NODISCARD;

void stx_follow_free(struct stx_follow *follow);

/* The consumer asks for tensor `index`, all of it. Answers what of it was not given out yet. */
struct stx_range stx_follow_demand(struct stx_follow *follow, size_t index);

/* Whether stx_follow_next would give out something. */
bool stx_follow_has_next(struct stx_follow *follow);

/* Give out the next run, cut at file offsets that are multiples of `block_bytes`. False if there is
 * none, or the consumer has to come nearer first. */
bool stx_follow_next(struct stx_follow *follow, uint64_t block_bytes, struct stx_range *next);

#endif
