/* SPDX-License-Identifier: Apache-2.0
 *
 * Copies many pieces of memory with several threads: one core does not fill a memory bus, and fresh
 * memory is made while it is first written to. Waits until all is copied.
 */
#ifndef STX_COPY_H
#define STX_COPY_H

#include <stddef.h>
#include <stdint.h>

/* One piece; source and target do not overlap. Both are borrowed during the call. */
struct stx_copy {
    char *target;
    const char *source;
    uint64_t size_bytes;
};

/* Do all of `copies`. Cannot fail: threads that are not to be had leave their share to the caller.
 */
void stx_copy_run(const struct stx_copy *copies, size_t count);

#endif
