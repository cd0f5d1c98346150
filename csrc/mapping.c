/* SPDX-License-Identifier: Apache-2.0
 *
 * Private file mappings with a count of users.
 *
 * DESIGN. Every tensor, slice and handle is one user; releasing is an atomic decrement, because it
 * happens wherever torch drops a storage: in any thread, with or without the interpreter's lock.
 * Files of at least 2 MiB are mapped at a 2 MiB boundary, so that the kernel may use huge pages
 * where the file system offers them. MAP_NORESERVE: pages that nobody writes need no swap behind
 * them, and a file larger than the memory stays loadable.
 */
#include "mapping.h"

#include <assert.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "checked.h"

#define HUGE_PAGE_BYTES (UINT64_C(2) << 20)
/* The kernel starts at most this much per call without looking at congestion in between. */
#define WILL_NEED_BYTES_MAX (UINT64_C(2) << 20)

struct stx_mapping {
    atomic_size_t users;
    char *bytes;
    uint64_t size_bytes;
};

/* 4 KiB mostly, 64 KiB on some machines; munmap and madvise refuse a start between two pages. */
static uint64_t page_bytes(void) { return (uint64_t)sysconf(_SC_PAGESIZE); }

/* Reserve addresses with room to align, so that the file can be placed over them. */
static void *reserve_aligned(uint64_t size_bytes) {
    const uint64_t wanted = size_bytes + HUGE_PAGE_BYTES;
    char *const reserved =
        mmap(NULL, (size_t)wanted, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) return NULL;
    const uint64_t start = (uint64_t)(uintptr_t)reserved;
    const uint64_t aligned = stx_align_up(start, HUGE_PAGE_BYTES);
    const uint64_t end = stx_align_up(aligned + size_bytes, page_bytes());
    if (aligned != start) (void)munmap(reserved, (size_t)(aligned - start));
    if (end < start + wanted)
        (void)munmap(reserved + (end - start), (size_t)(start + wanted - end));
    return reserved + (aligned - start);
}

static void *map_file(const struct stx_file *file) {
    const uint64_t size_bytes = file->identity.size_bytes;
    const int protection = PROT_READ | PROT_WRITE;
    const int flags = MAP_PRIVATE | MAP_NORESERVE;
    void *const place = size_bytes >= HUGE_PAGE_BYTES ? reserve_aligned(size_bytes) : NULL;
    if (place == NULL) return mmap(NULL, (size_t)size_bytes, protection, flags, file->fd, 0);
    void *const mapped =
        mmap(place, (size_t)size_bytes, protection, flags | MAP_FIXED, file->fd, 0);
    if (mapped == MAP_FAILED) {
        const int failure = errno;
        (void)munmap(place, (size_t)size_bytes);
        errno = failure;
    }
    return mapped;
}

enum stx_status stx_mapping_open(struct stx_mapping **mapping, const struct stx_file *file,
                                 struct stx_err *err) {
    assert(file->identity.size_bytes != 0);
    struct stx_mapping *opened = malloc(sizeof *opened);
    if (opened == NULL) return stx_err_set(err, STX_ERR_MEMORY, "no memory for a mapping");
    void *const bytes = map_file(file);
    if (bytes == MAP_FAILED) {
        (void)stx_err_set_errno(err, errno, "mmap");
        free(opened);
        return err->status;
    }
    opened->bytes = bytes;
    opened->size_bytes = file->identity.size_bytes;
    atomic_init(&opened->users, 1);
    *mapping = opened;
    return STX_OK;
}

void stx_mapping_retain(struct stx_mapping *mapping) {
    const size_t before = atomic_fetch_add_explicit(&mapping->users, 1, memory_order_relaxed);
    assert(before != 0);
    (void)before;
}

void stx_mapping_release(struct stx_mapping *mapping) {
    if (mapping == NULL) return;
    const size_t before = atomic_fetch_sub_explicit(&mapping->users, 1, memory_order_acq_rel);
    assert(before != 0);
    if (before != 1) return;
    (void)munmap(mapping->bytes, (size_t)mapping->size_bytes);
    free(mapping);
}

char *stx_mapping_bytes(const struct stx_mapping *mapping) { return mapping->bytes; }

void stx_mapping_expect_random(const struct stx_mapping *mapping) {
    (void)madvise(mapping->bytes, (size_t)mapping->size_bytes, MADV_RANDOM);
}

void stx_mapping_will_need(const struct stx_mapping *mapping, uint64_t begin_bytes,
                           uint64_t end_bytes) {
    assert(begin_bytes <= end_bytes && end_bytes <= mapping->size_bytes);
    for (uint64_t at = stx_align_down(begin_bytes, page_bytes()); at < end_bytes;) {
        const uint64_t piece = stx_min_u64(end_bytes - at, WILL_NEED_BYTES_MAX);
        (void)madvise(mapping->bytes + at, (size_t)piece, MADV_WILLNEED);
        at += piece;
    }
}
