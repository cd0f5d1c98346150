/* SPDX-License-Identifier: Apache-2.0
 *
 * Reads a mapping's bytes before the consumer touches them: a few helper threads that run beside
 * it, for all mappings of the process.
 *
 * Guarantees: exactly the bytes of the plan are asked for, nothing between them; what the page
 * cache holds already is left alone; helpers leave when a mapping has no users any more; a file
 * truncated meanwhile is counted, never a signal in a helper. Nothing waits for the helpers: what
 * they have not read yet, the consumer's page faults read. No Python.
 */
#ifndef STX_READAHEAD_H
#define STX_READAHEAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "follow.h"
#include "mapping.h"

/* Have all of `ranges` read, in their order, at most `limit_bytes` of them. `dense`: they are (as
 * good as) the whole file. `ranges` is moved and freed with free(). What fails costs speed alone.
 */
void stx_readahead_all(struct stx_mapping *mapping, struct stx_range *ranges, size_t count,
                       bool dense, uint64_t limit_bytes);

/* Have one range read that is wanted now: a short one by the calling thread, which does not wait
 * for it, a long one by the helpers. */
void stx_readahead_one(struct stx_mapping *mapping, uint64_t begin_bytes, uint64_t end_bytes);

/* Prepare for a consumer that asks for one tensor after the other. `tensors` holds each tensor's
 * range in file order; `orders` are permutations of their indexes, NULL where there is none. All
 * are moved, also on failure, and freed with free(). `dense` as above. Does nothing if a mapping
 * was prepared before. */
void stx_readahead_prepare(struct stx_mapping *mapping, struct stx_range *tensors, size_t count,
                           uint32_t *orders[STX_FOLLOW_ORDERS - 1], bool dense,
                           uint64_t limit_bytes);

/* Whether stx_readahead_prepare or stx_readahead_all has been called for it. */
bool stx_readahead_is_prepared(const struct stx_mapping *mapping);

/* The consumer is about to touch [begin, end), all or a part of tensor `index` of a prepared
 * mapping. Reads it first, and goes on in the order that the consumer has shown, further ahead the
 * longer it has kept to it. */
void stx_readahead_demand(struct stx_mapping *mapping, size_t index, uint64_t begin_bytes,
                          uint64_t end_bytes);

/* Sums of this process. */
struct stx_readahead_sums {
    uint64_t requests;   /* ranges given to the system */
    uint64_t bytes;      /* their sizes in whole pages */
    uint64_t over_bytes; /* of it, what page boundaries added */
    uint64_t failures;   /* ranges that could not be read: a truncated file */
    uint64_t threads;    /* helpers that are there now */
};
struct stx_readahead_sums stx_readahead_count(void);

/* Wait until the helpers have nothing to do, at most `timeout_ms`. Whether that is so. */
bool stx_readahead_settle(uint32_t timeout_ms);

#endif
