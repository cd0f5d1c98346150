/* SPDX-License-Identifier: Apache-2.0
 *
 * Private file mappings with a count of users and one of holders.
 *
 * DESIGN. Every tensor, slice and handle is one user; releasing is an atomic decrement, because it
 * happens wherever torch drops a storage: in any thread, with or without the interpreter's lock.
 * Read-ahead is a holder. Both counts share one word, so that exactly one thread sees them end.
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

#define ONE_USER UINT64_C(1)
#define ONE_HOLDER (UINT64_C(1) << 40)
#define USERS_MASK (ONE_HOLDER - 1)

struct stx_mapping {
    atomic_uint_fast64_t counts;
    _Atomic(struct stx_mapping_notes *) notes;
    char *bytes;
    uint64_t size_bytes;
    uint32_t label;
    bool residency_is_told; /* mincore says the truth to owners; others hear that all is there */
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
    opened->residency_is_told = file->residency_is_told;
    opened->label = file->label;
    atomic_init(&opened->counts, ONE_USER);
    atomic_init(&opened->notes, NULL);
    *mapping = opened;
    return STX_OK;
}

static void add(struct stx_mapping *mapping, uint64_t one) {
    const uint64_t before = atomic_fetch_add_explicit(&mapping->counts, one, memory_order_relaxed);
    assert(before != 0);
    (void)before;
}

static void subtract(struct stx_mapping *mapping, uint64_t one) {
    const uint64_t before = atomic_fetch_sub_explicit(&mapping->counts, one, memory_order_acq_rel);
    assert(before >= one);
    if (before != one) return;
    struct stx_mapping_notes *const notes = stx_mapping_notes(mapping);
    if (notes != NULL) notes->free(notes);
    (void)munmap(mapping->bytes, (size_t)mapping->size_bytes);
    free(mapping);
}

void stx_mapping_retain(struct stx_mapping *mapping) { add(mapping, ONE_USER); }

void stx_mapping_release(struct stx_mapping *mapping) {
    if (mapping != NULL) subtract(mapping, ONE_USER);
}

void stx_mapping_hold(struct stx_mapping *mapping) { add(mapping, ONE_HOLDER); }

void stx_mapping_drop(struct stx_mapping *mapping) { subtract(mapping, ONE_HOLDER); }

bool stx_mapping_is_used(const struct stx_mapping *mapping) {
    return (atomic_load_explicit(&mapping->counts, memory_order_relaxed) & USERS_MASK) != 0;
}

struct stx_mapping_notes *stx_mapping_notes(const struct stx_mapping *mapping) {
    return atomic_load_explicit(&mapping->notes, memory_order_acquire);
}

bool stx_mapping_set_notes(struct stx_mapping *mapping, struct stx_mapping_notes *notes) {
    struct stx_mapping_notes *none = NULL;
    return atomic_compare_exchange_strong(&mapping->notes, &none, notes);
}

uint64_t stx_mapping_size_bytes(const struct stx_mapping *mapping) { return mapping->size_bytes; }

uint32_t stx_mapping_label(const struct stx_mapping *mapping) { return mapping->label; }

char *stx_mapping_bytes(const struct stx_mapping *mapping) { return mapping->bytes; }

void stx_mapping_expect_random(const struct stx_mapping *mapping) {
    (void)madvise(mapping->bytes, (size_t)mapping->size_bytes, MADV_RANDOM);
}

void stx_mapping_expect_sequential(const struct stx_mapping *mapping) {
    (void)madvise(mapping->bytes, (size_t)mapping->size_bytes, MADV_NORMAL);
}

void stx_mapping_expect_all(const struct stx_mapping *mapping) {
    (void)madvise(mapping->bytes, (size_t)mapping->size_bytes, MADV_HUGEPAGE);
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

enum stx_status stx_mapping_populate(const struct stx_mapping *mapping, uint64_t begin_bytes,
                                     uint64_t end_bytes, struct stx_err *err) {
    assert(begin_bytes <= end_bytes && end_bytes <= mapping->size_bytes);
    const uint64_t start = stx_align_down(begin_bytes, page_bytes());
    while (madvise(mapping->bytes + start, (size_t)(end_bytes - start), MADV_POPULATE_READ) != 0) {
        if (errno == EINTR || errno == EAGAIN) continue;
        if (errno == EINVAL)
            return stx_err_set(err, STX_ERR_UNSUPPORTED, "pages cannot be populated");
        return stx_err_set_errno(err, errno, "madvise");
    }
    return STX_OK;
}

void stx_mapping_sample(const struct stx_mapping *mapping, uint64_t begin_bytes, uint64_t end_bytes,
                        uint32_t *resident_pages, uint32_t *asked_pages) {
    unsigned char pages[STX_MAPPING_SAMPLE_PAGES];
    const uint64_t page = page_bytes();
    const uint64_t middle = begin_bytes + (end_bytes - begin_bytes) / 2;
    const uint64_t half = page * (STX_MAPPING_SAMPLE_PAGES / 2);
    const uint64_t begin =
        stx_max_u64(begin_bytes, middle > half ? stx_align_down(middle - half, page) : 0);
    const uint64_t start = stx_align_down(begin, page);
    const uint64_t end = stx_min_u64(end_bytes, start + page * STX_MAPPING_SAMPLE_PAGES);
    if (!mapping->residency_is_told || begin_bytes == end_bytes ||
        mincore(mapping->bytes + start, (size_t)(end - start), pages) != 0)
        return;
    const uint32_t count = (uint32_t)((end - start + page - 1) / page);
    for (uint32_t i = 0; i < count; i++) *resident_pages += pages[i] & 1;
    *asked_pages += count;
}
