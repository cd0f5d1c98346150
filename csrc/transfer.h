/* SPDX-License-Identifier: Apache-2.0
 *
 * Reads parts of a file onto a device: files fill the slots of a staging ring, and each slot is
 * copied to its targets while the next ones are read.
 *
 * Guarantee: after STX_OK every target holds its bytes. After anything else no copy is under way
 * any more: the targets may be freed. Waits; call it without the interpreter's lock. No Python.
 */
#ifndef STX_TRANSFER_H
#define STX_TRANSFER_H

#include <stddef.h>
#include <stdint.h>

#include "err.h"
#include "file.h"
#include "load.h"
#include "owned.h"
#include "staging.h"

/* Bytes of the file and their place on the device. */
struct stx_extent {
    uint64_t begin_bytes; /* in the file */
    uint64_t end_bytes;   /* more than `begin_bytes` */
    uint64_t target;      /* an address on the device */
};

/* What to read and where to. Everything is borrowed during the call. */
struct stx_transfer {
    const struct stx_file *file;
    const struct stx_extent *extents; /* ascending in the file, none overlaps another */
    size_t extents_count;
    struct stx_staging *staging;
    void *stream; /* of the caller, who may have work on it that still uses the targets' memory */
    const struct stx_owned_options *options;
    const struct stx_owned_patience *patience;
};

/* Do it. `result` and `way` are filled as by stx_owned_read. Errors: as stx_load_run, and
 * STX_ERR_DEVICE; `result->cancelled` with STX_OK if the patience ended. */
enum stx_status stx_transfer_run(const struct stx_transfer *transfer,
                                 struct stx_load_result *result, struct stx_owned_way *way,
                                 struct stx_err *err) STX_NODISCARD;

#endif
