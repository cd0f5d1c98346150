/* SPDX-License-Identifier: Apache-2.0
 *
 * Anonymous mappings, in huge pages where the system has them: fresh memory in small pages is
 * slower than the disk. Small blocks come from malloc(), where a mapping would cost more than the
 * read.
 */
#include "arena.h"

#include <assert.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "checked.h"
#include "memory.h"

#define MAPPED_BYTES_MIN (UINT64_C(256) << 10)
#define HEAP_ALIGN_BYTES 64

struct stx_arena {
    atomic_size_t users;
    char *bytes;
    uint64_t size_bytes;
    void *mapped; /* NULL: from malloc() */
    uint64_t mapped_bytes;
};

static uint64_t page_bytes(void) { return (uint64_t)sysconf(_SC_PAGESIZE); }

static bool get_mapped(struct stx_arena *arena, bool huge) {
    const uint64_t spare_bytes = huge ? STX_HUGE_PAGE_BYTES : 0;
    uint64_t wanted_bytes;
    if (!stx_checked_add(stx_align_up(arena->size_bytes, page_bytes()), spare_bytes,
                         &wanted_bytes) ||
        wanted_bytes > SIZE_MAX)
        return false;
    void *const mapped = mmap(NULL, (size_t)wanted_bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return false;
    const uint64_t start = (uint64_t)(uintptr_t)mapped;
    const uint64_t skip_bytes = huge ? stx_align_up(start, STX_HUGE_PAGE_BYTES) - start : 0;
    arena->mapped = mapped;
    arena->mapped_bytes = wanted_bytes;
    arena->bytes = (char *)mapped + skip_bytes;
    if (huge) (void)madvise(arena->bytes, (size_t)(wanted_bytes - skip_bytes), MADV_HUGEPAGE);
    return true;
}

enum stx_status stx_arena_open(struct stx_arena **arena, uint64_t size_bytes, struct stx_err *err) {
    struct stx_arena *opened = calloc(1, sizeof *opened);
    if (opened == NULL) return stx_err_set(err, STX_ERR_MEMORY, "no memory for tensors");
    opened->size_bytes = size_bytes;
    atomic_init(&opened->users, 1);
    bool got = false;
    if (size_bytes < MAPPED_BYTES_MIN) {
        opened->bytes = aligned_alloc(
            HEAP_ALIGN_BYTES, (size_t)stx_align_up(stx_max_u64(size_bytes, 1), HEAP_ALIGN_BYTES));
        got = opened->bytes != NULL;
    } else {
        /* Little address space: without the room to align it. */
        got = get_mapped(opened, size_bytes >= STX_HUGE_PAGE_BYTES) || get_mapped(opened, false);
    }
    if (!got) {
        free(opened);
        return stx_err_set(err, STX_ERR_MEMORY, "no memory for %llu bytes of tensors",
                           (unsigned long long)size_bytes);
    }
    *arena = opened;
    return STX_OK;
}

void stx_arena_retain(struct stx_arena *arena) {
    const size_t before = atomic_fetch_add_explicit(&arena->users, 1, memory_order_relaxed);
    assert(before != 0);
    (void)before;
}

void stx_arena_release(struct stx_arena *arena) {
    if (arena == NULL) return;
    const size_t before = atomic_fetch_sub_explicit(&arena->users, 1, memory_order_acq_rel);
    assert(before != 0);
    if (before != 1) return;
    if (arena->mapped != NULL) (void)munmap(arena->mapped, (size_t)arena->mapped_bytes);
    if (arena->mapped == NULL) free(arena->bytes);
    free(arena);
}

void stx_arena_give_back(const struct stx_arena *arena, uint64_t begin_bytes, uint64_t end_bytes) {
    assert(begin_bytes <= end_bytes && end_bytes <= arena->size_bytes);
    const uint64_t begin = stx_align_up(begin_bytes, page_bytes());
    const uint64_t end = stx_align_down(end_bytes, page_bytes());
    if (arena->mapped != NULL && begin < end)
        (void)madvise(arena->bytes + begin, (size_t)(end - begin), MADV_DONTNEED);
}

char *stx_arena_bytes(const struct stx_arena *arena) { return arena->bytes; }

uint64_t stx_arena_size_bytes(const struct stx_arena *arena) { return arena->size_bytes; }

void stx_arena_populate(const struct stx_arena *arena, uint64_t begin_bytes, uint64_t end_bytes) {
    assert(begin_bytes <= end_bytes && end_bytes <= arena->size_bytes);
    const uint64_t begin = stx_align_down(begin_bytes, page_bytes());
    if (arena->mapped != NULL)
        (void)madvise(arena->bytes + begin, (size_t)(end_bytes - begin), MADV_POPULATE_WRITE);
}
