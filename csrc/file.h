/* SPDX-License-Identifier: Apache-2.0
 *
 * A regular file opened for reading: its size, its identity, whole reads at an offset, and what
 * the page cache holds of it. Pipes and devices are refused unopened.
 */
#ifndef STX_FILE_H
#define STX_FILE_H

#include <stdbool.h>
#include <stdint.h>

#include "err.h"

/* What makes two opens the same file content, as far as the system tells. */
struct stx_file_identity {
    uint64_t device;
    uint64_t inode;
    uint64_t size_bytes;
    int64_t mtime_ns;
};

/* Caller-owned. `fd` is -1 when closed. */
struct stx_file {
    int fd;
    bool residency_is_told; /* what the page cache holds of it is no secret from this process */
    uint32_t label;         /* its path, in a recording (trace.h) */
    struct stx_file_identity identity;
};

/* Open `path` for reading. Errors: STX_ERR_IO; STX_ERR_UNSUPPORTED if it is no regular file. */
enum stx_status stx_file_open(struct stx_file *file, const char *path,
                              struct stx_err *err) STX_NODISCARD;

/* Close it; a closed file (fd -1) is fine. */
void stx_file_close(struct stx_file *file);

/* Read exactly `size_bytes` at `offset_bytes` into `buffer`. Errors: STX_ERR_IO, also for a file
 * that ends before (it was truncated since it was opened). */
enum stx_status stx_file_read(const struct stx_file *file, void *buffer, uint64_t size_bytes,
                              uint64_t offset_bytes, struct stx_err *err) STX_NODISCARD;

/* A second descriptor of the same file, for reads past the page cache that are aligned to 4096,
 * where one such read proves that they work; -1 where they do not. Owned by the caller: close(). */
int stx_file_open_direct(const struct stx_file *file) STX_NODISCARD;

/* How much of [begin, end) the page cache holds, in whole pages. Errors: as stx_file_cached_bytes.
 */
enum stx_status stx_file_cached_range(const struct stx_file *file, uint64_t begin_bytes,
                                      uint64_t end_bytes, uint64_t *cached_bytes,
                                      struct stx_err *err) STX_NODISCARD;

/* Whether the file lies behind a network or in a process: many reads at a time hide the distance.
 */
bool stx_file_is_remote(const struct stx_file *file);

/* Tell the system that whole runs will be read in order, so that its read-ahead window doubles; or
 * that nothing but what is asked for will be read. Hints: what it answers does not matter. */
void stx_file_expect_sequential(const struct stx_file *file);
void stx_file_expect_random(const struct stx_file *file);

/* How many bytes of the file are in the page cache (whole pages; at most 2^63). Errors:
 * STX_ERR_UNSUPPORTED where the system does not tell (before Linux 6.5, or a file that is not
 * ours to ask about), which callers treat as "not cached". */
enum stx_status stx_file_cached_bytes(const struct stx_file *file, uint64_t *cached_bytes,
                                      struct stx_err *err) STX_NODISCARD;

#endif
