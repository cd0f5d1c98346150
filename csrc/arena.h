/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory that tensors own: one block for all tensors of a load, or of a piece of one, which lives
 * as long as any of them does. Aligned so that direct reads land in place. What a dropped tensor
 * does not share with a neighbour goes back to the system at once.
 */
#ifndef STX_ARENA_H
#define STX_ARENA_H

#include <stdint.h>

#include "err.h"

struct stx_arena; /* opaque, reference-counted */

/* `size_bytes` of fresh memory, with one user, the caller. Errors: STX_ERR_MEMORY. */
enum stx_status stx_arena_open(struct stx_arena **arena, uint64_t size_bytes,
                               struct stx_err *err) STX_NODISCARD;

/* One more user. Any thread, no lock. */
void stx_arena_retain(struct stx_arena *arena);

/* One user less; the last one gives all back. Any thread, no lock, no Python. NULL is fine. */
void stx_arena_release(struct stx_arena *arena);

/* Nobody uses [begin, end) of it any more: pages that lie in it whole go back. Any thread. */
void stx_arena_give_back(const struct stx_arena *arena, uint64_t begin_bytes, uint64_t end_bytes);

/* Its bytes; aligned to 4096 from 256 KiB on, to 64 below. Borrowed until the caller's use ends. */
char *stx_arena_bytes(const struct stx_arena *arena);

uint64_t stx_arena_size_bytes(const struct stx_arena *arena);

/* Have the pages of [begin, end) made before they are written to. A hint. */
void stx_arena_populate(const struct stx_arena *arena, uint64_t begin_bytes, uint64_t end_bytes);

#endif
