/* SPDX-License-Identifier: Apache-2.0
 *
 * Large blocks of heap memory, backed by huge pages where the system offers them: touching fresh
 * memory costs a fault per page, and that is most of the cost of a large header.
 */
#ifndef STX_MEMORY_H
#define STX_MEMORY_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#define STX_HUGE_PAGE_BYTES ((size_t)2 << 20)

/* malloc(), with huge pages asked for inside a large block. Freed with free(). NULL when memory is
 * out. */
static inline void *stx_memory_alloc(size_t size_bytes) {
    char *block = malloc(size_bytes);
    if (block != NULL && size_bytes >= STX_HUGE_PAGE_BYTES) {
        const size_t skip = (size_t)(-(uintptr_t)block % STX_HUGE_PAGE_BYTES);
        const size_t whole = (size_bytes - skip) & ~(STX_HUGE_PAGE_BYTES - 1);
        if (skip < size_bytes && whole != 0) (void)madvise(block + skip, whole, MADV_HUGEPAGE);
    }
    return block;
}

#endif
