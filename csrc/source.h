/* SPDX-License-Identifier: Apache-2.0
 *
 * One safetensors file, opened for private mapping: its header, its mapping, its identity.
 *
 * Opening reads the header and nothing else, and leaves no descriptor open. Everything that can be
 * refused is refused here.
 */
#ifndef STX_SOURCE_H
#define STX_SOURCE_H

#include <stdbool.h>
#include <stdint.h>

#include "err.h"
#include "file.h"
#include "header.h"
#include "mapping.h"

/* Caller-owned; a zeroed struct is a closed source. */
struct stx_source {
    struct stx_header header;
    struct stx_mapping *mapping; /* the source is one of its users */
    struct stx_file_identity identity;
    uint64_t header_reads_count; /* requests that reading the header took */
    uint64_t header_read_bytes;
    uint64_t cached_bytes; /* in the page cache when it was opened, if asked; 0 where unknown */
};

/* Open the file at `path`; `ask_cached` also asks what the page cache holds of it. Slow: call it
 * without the interpreter's lock. On error nothing stays open. Errors: STX_ERR_IO, STX_ERR_FORMAT
 * with the byte position, STX_ERR_UNSUPPORTED, STX_ERR_MEMORY. */
enum stx_status stx_source_open(struct stx_source *source, const char *path, bool ask_cached,
                                struct stx_err *err) STX_NODISCARD;

/* Give up the header and this source's use of the mapping; tensors made from it stay valid. */
void stx_source_close(struct stx_source *source);

#endif
