/* SPDX-License-Identifier: Apache-2.0
 *
 * One safetensors file, opened: its header, its identity, and its bytes either as a private mapping
 * or behind a descriptor.
 *
 * Opening reads the header and nothing else. A mapped source leaves no descriptor open. Everything
 * that can be refused is refused here.
 */
#ifndef STX_SOURCE_H
#define STX_SOURCE_H

#include <stdbool.h>
#include <stdint.h>

#include "err.h"
#include "file.h"
#include "header.h"
#include "header_cache.h"
#include "mapping.h"

/* Caller-owned; a zeroed struct with `file.fd` -1 is a closed source. */
struct stx_source {
    struct stx_header header; /* a copy of the shared one's table, whose arrays it borrows */
    struct stx_shared_header *shared;
    struct stx_mapping *mapping; /* the source is one of its users; NULL with STX_SOURCE_FILE */
    struct stx_file file;        /* fd -1 unless STX_SOURCE_FILE */
    uint64_t header_reads_count; /* requests that reading the header took */
    uint64_t header_read_bytes;
    bool header_reused;    /* the table was there already */
    uint64_t cached_bytes; /* in the page cache when it was opened, if asked; 0 where unknown */
};

enum stx_source_how {
    STX_SOURCE_MAPPED,
    STX_SOURCE_FILE,  /* no mapping, but the descriptor stays open */
    STX_SOURCE_ASKED, /* mapped, and asked what the page cache holds of it */
};

/* Open the file at `path`. Slow: call it without the interpreter's lock. On error nothing stays
 * open. Errors: STX_ERR_IO, STX_ERR_FORMAT with the byte position, STX_ERR_UNSUPPORTED,
 * STX_ERR_MEMORY. */
enum stx_status stx_source_open(struct stx_source *source, const char *path,
                                enum stx_source_how how, struct stx_err *err) STX_NODISCARD;

/* Give up the header, the descriptor and this source's use of the mapping; tensors made from it
 * stay valid. */
void stx_source_close(struct stx_source *source);

#endif
