/* SPDX-License-Identifier: Apache-2.0
 *
 * Parsed headers, shared by all who open the same file, and remembered for who opens it again.
 *
 * Some programs open a file anew for every layer of every forward pass. What they read of it is
 * always compared with what the table was made of, byte by byte, so a changed file never meets a
 * stale table: only the parsing is saved. Bounded: a file is remembered from its second opening on,
 * the least recently used is forgotten. Any thread; forked children may go on using it.
 */
#ifndef STX_HEADER_CACHE_H
#define STX_HEADER_CACHE_H

#include <stdbool.h>
#include <stdint.h>

#include "err.h"
#include "header.h"

struct stx_shared_header; /* opaque, counted */

/* Which file a header was read from: where to look, and no proof of anything. */
struct stx_header_key {
    uint64_t device;
    uint64_t inode;
    uint64_t file_size_bytes;
};

/* The table of the header in `*text`: the beginning of the file, from malloc(), as
 * stx_header_parse wants it behind the prefix. `*text` stays the caller's, or is moved and then
 * NULL. Release the result; `*reused`: nothing was parsed. Errors: those of stx_header_parse. */
enum stx_status stx_header_cache_get(struct stx_shared_header **shared, bool *reused,
                                     const struct stx_header_key *key, char **text,
                                     uint64_t json_bytes, struct stx_err *err) STX_NODISCARD;

/* Its table, which does not change. Borrowed until the release. */
const struct stx_header *stx_shared_header_table(const struct stx_shared_header *shared);

/* A number no other table has; 0 while it is in no cache, so that nobody else has it. */
uint64_t stx_shared_header_number(const struct stx_shared_header *shared);

/* One user less. NULL is fine. */
void stx_shared_header_release(struct stx_shared_header *shared);

#endif
