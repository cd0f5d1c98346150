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

#include <stdbool.h>
#include <stdint.h>

#include "err.h"
#include "file.h"

struct stx_mapping; /* opaque, reference-counted */

/* What lives and dies with a mapping without keeping it alive (the read-ahead's notes). */
struct stx_mapping_notes {
    void (*free)(struct stx_mapping_notes *notes); /* any thread, no lock, no Python */
};

/* Map all of `file`. After STX_OK `*mapping` has one user, the caller. Errors: STX_ERR_IO,
 * STX_ERR_MEMORY. */
enum stx_status stx_mapping_open(struct stx_mapping **mapping, const struct stx_file *file,
                                 struct stx_err *err) STX_NODISCARD;

/* One more user. Any thread, no lock. */
void stx_mapping_retain(struct stx_mapping *mapping);

/* One user less; the last one unmaps. Any thread, no lock, no Python; also during the exit of the
 * interpreter. NULL is fine. */
void stx_mapping_release(struct stx_mapping *mapping);

/* One more holder: somebody who reads ahead for the users. A mapping lives until it has neither
 * users nor holders; a holder is told by stx_mapping_is_used when nobody is left to read for. */
void stx_mapping_hold(struct stx_mapping *mapping);
void stx_mapping_drop(struct stx_mapping *mapping);
bool stx_mapping_is_used(const struct stx_mapping *mapping);

/* The notes of this mapping, NULL until they are set; set once, by whoever comes first. Owned by
 * the mapping. False: somebody was first, and `notes` stays the caller's. */
struct stx_mapping_notes *stx_mapping_notes(const struct stx_mapping *mapping);
bool stx_mapping_set_notes(struct stx_mapping *mapping, struct stx_mapping_notes *notes);

/* The file's size. */
uint64_t stx_mapping_size_bytes(const struct stx_mapping *mapping);

/* The file's path, in a recording (trace.h). */
uint32_t stx_mapping_label(const struct stx_mapping *mapping);

/* The file's bytes. Borrowed until the caller's use of the mapping ends. */
char *stx_mapping_bytes(const struct stx_mapping *mapping);

/* How faults read: the neighbours, too (the default), or only the page itself. */
void stx_mapping_expect_random(const struct stx_mapping *mapping);
void stx_mapping_expect_sequential(const struct stx_mapping *mapping);

/* All of it will be touched: huge pages, where the file system has them for files. A hint. */
void stx_mapping_expect_all(const struct stx_mapping *mapping);

/* Start reading the pages of [begin, end) into the page cache, without waiting. Offsets lie in the
 * file. A hint. */
void stx_mapping_will_need(const struct stx_mapping *mapping, uint64_t begin_bytes,
                           uint64_t end_bytes);

/* Read the pages of [begin, end) and enter them into this process's page table, waiting for both.
 * Errors: STX_ERR_IO, also where the file was truncated; STX_ERR_UNSUPPORTED before Linux 5.14. */
enum stx_status stx_mapping_populate(const struct stx_mapping *mapping, uint64_t begin_bytes,
                                     uint64_t end_bytes, struct stx_err *err) STX_NODISCARD;

/* Count resident pages among at most STX_MAPPING_SAMPLE_PAGES in the middle of [begin, end); adds
 * to both sums. Adds nothing where the system does not tell: a file of somebody else's. */
#define STX_MAPPING_SAMPLE_PAGES 16
void stx_mapping_sample(const struct stx_mapping *mapping, uint64_t begin_bytes, uint64_t end_bytes,
                        uint32_t *resident_pages, uint32_t *asked_pages);

#endif
