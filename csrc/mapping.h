/* SPDX-License-Identifier: Apache-2.0
 *
 * A whole file as private, writable, zero-copy memory that lives as long as anybody uses it.
 *
 * Writes go to private copies of pages and never reach the file. The descriptor is not needed
 * once the mapping exists. A file truncated by somebody else while mapped raises SIGBUS on touch,
 * as any mapping does.
 */
#ifndef STX_MAPPING_H
#define STX_MAPPING_H

#include <stdint.h>

#include "err.h"
#include "file.h"

struct stx_mapping; /* opaque, reference-counted */

/* Map all of `file`. After STX_OK `*mapping` has one user, the caller. Errors: STX_ERR_IO,
 * STX_ERR_MEMORY. */
enum stx_status stx_mapping_open(struct stx_mapping **mapping, const struct stx_file *file,
                                 struct stx_err *err) STX_NODISCARD;

/* One more user. Any thread, no lock. */
void stx_mapping_retain(struct stx_mapping *mapping);

/* One user less; the last one unmaps. Any thread, no lock, no Python; also during the exit of the
 * interpreter. NULL is fine. */
void stx_mapping_release(struct stx_mapping *mapping);

/* The file's bytes. Borrowed until the caller's use of the mapping ends. */
char *stx_mapping_bytes(const struct stx_mapping *mapping);

/* Only parts of the file will be touched: a fault reads no neighbours. A hint. */
void stx_mapping_expect_random(const struct stx_mapping *mapping);

/* Start reading the pages of [begin, end) into the page cache, without waiting. Offsets lie in the
 * file. A hint. */
void stx_mapping_will_need(const struct stx_mapping *mapping, uint64_t begin_bytes,
                           uint64_t end_bytes);

#endif
