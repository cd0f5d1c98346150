/* SPDX-License-Identifier: Apache-2.0
 *
 * A load that is handed out piece by piece while it goes on, in bounded memory.
 *
 * One thread reads, submits and drains for as long as the stream is open; the consumer only waits
 * for pieces, from any thread, one at a time. Guarantees: pieces come in file order; what has been
 * read and not been given back never exceeds the window, nor does a piece come before all of its
 * bytes are there; closing ends the reads, whoever does it and wherever the consumer is. No Python.
 */
#ifndef STX_STREAM_H
#define STX_STREAM_H

#include <stdbool.h>
#include <stdint.h>

#include "arena.h"
#include "file.h"
#include "header.h"
#include "load.h"
#include "owned.h"

struct stx_stream; /* opaque; owned by whoever opened it */

/* Some tensors, in memory. */
struct stx_stream_piece {
    struct stx_arena *arena;      /* the consumer's use of it: release it */
    const struct stx_read *reads; /* borrowed until the stream is closed; for stx_plan_place */
    size_t reads_count;
    uint32_t tensor_first;
    uint32_t tensors_count; /* from the first on, those left out included; 0: no more pieces */
};

/* Begin reading the kept tensors of `file` from `tensor_first` on. `file` is moved, also on
 * failure; `header` and `keep` are borrowed during the call. `window_bytes` is raised to the
 * largest tensor. Errors: STX_ERR_MEMORY; STX_ERR_IO if there can be no thread. */
enum stx_status stx_stream_open(struct stx_stream **stream, struct stx_file *file,
                                const struct stx_header *header, const uint8_t *keep,
                                uint32_t tensor_first, const struct stx_owned_options *options,
                                uint64_t window_bytes, struct stx_err *err) STX_NODISCARD;

/* Wait at most `timeout_ms` for the next piece; `*ready` says whether it came. The piece before it
 * counts as given back. Errors: what the load ended with; `failed_offset_bytes` says where. */
enum stx_status stx_stream_next(struct stx_stream *stream, uint32_t timeout_ms,
                                struct stx_stream_piece *piece, bool *ready,
                                uint64_t *failed_offset_bytes, struct stx_err *err) STX_NODISCARD;

/* The file that is read. Borrowed until the stream is closed. */
const struct stx_file *stx_stream_file(const struct stx_stream *stream);

/* End the reads and wait for them. Nothing but what follows may be asked of the stream then. */
void stx_stream_stop(struct stx_stream *stream);

/* What a stopped stream has done, of how many bytes of tensors, and how. */
struct stx_load_result stx_stream_result(const struct stx_stream *stream, uint64_t *wanted_bytes,
                                         struct stx_owned_way *way);

/* Stop it if need be, release everything but pieces handed out. NULL is fine. */
void stx_stream_close(struct stx_stream *stream);

/* The same in a forked child, where there is no thread to wait for. */
void stx_stream_abandon(struct stx_stream *stream);

#endif
