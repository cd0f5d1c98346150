/* SPDX-License-Identifier: Apache-2.0
 *
 * A short list, searched from its beginning: what it saves is hundreds of times what it costs.
 */
#include "header_cache.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "json.h"

#define ENTRIES_MAX 256
#define SEEN_MAX 256
/* The tables take about as much again. */
#define TEXTS_BYTES_MAX (UINT64_C(32) << 20)
#define TEXT_BYTES_MAX (UINT64_C(8) << 20)

struct stx_shared_header {
    struct stx_header header;
    atomic_size_t users; /* the cache is one */
    uint64_t number;     /* written before it is in the cache */
    struct stx_header_key key;
    char *text; /* the prefix, the JSON; NULL unless it was in the cache */
    uint64_t json_bytes;
    uint64_t used_at; /* guarded by the lock */
};

static struct {
    pthread_mutex_t lock; /* guards all of it */
    pthread_once_t once;
    bool is_fork_safe;
    struct stx_shared_header *entries[ENTRIES_MAX];
    size_t entries_count;
    uint64_t texts_bytes;
    uint64_t clock;
    uint64_t numbers;
    struct stx_header_key seen[SEEN_MAX]; /* opened once, a ring */
    size_t seen_next;
} cache = {.lock = PTHREAD_MUTEX_INITIALIZER, .once = PTHREAD_ONCE_INIT};

static void lock_cache(void) { (void)pthread_mutex_lock(&cache.lock); }
static void unlock_cache(void) { (void)pthread_mutex_unlock(&cache.lock); }

static void prepare(void) {
    cache.is_fork_safe = pthread_atfork(lock_cache, unlock_cache, unlock_cache) == 0;
}

static bool is_same(const struct stx_header_key *a, const struct stx_header_key *b) {
    return a->inode == b->inode && a->device == b->device &&
           a->file_size_bytes == b->file_size_bytes;
}

/* The index of the file's entry, or ENTRIES_MAX. With the lock held. */
static size_t find(const struct stx_header_key *key) {
    for (size_t i = 0; i < cache.entries_count; i++)
        if (is_same(&cache.entries[i]->key, key)) return i;
    return ENTRIES_MAX;
}

/* With the lock held; releasing takes none. */
static void forget(size_t index) {
    struct stx_shared_header *const entry = cache.entries[index];
    cache.entries[index] = cache.entries[--cache.entries_count];
    cache.entries[cache.entries_count] = NULL;
    cache.texts_bytes -= entry->json_bytes;
    stx_shared_header_release(entry);
}

static size_t find_oldest(void) {
    size_t oldest = 0;
    for (size_t i = 1; i < cache.entries_count; i++)
        if (cache.entries[i]->used_at < cache.entries[oldest]->used_at) oldest = i;
    return oldest;
}

/* Whether the file was opened before; from now on it was. With the lock held. */
static bool was_seen(const struct stx_header_key *key) {
    for (size_t i = 0; i < SEEN_MAX; i++)
        if (is_same(&cache.seen[i], key)) return true;
    cache.seen[cache.seen_next] = *key;
    cache.seen_next = (cache.seen_next + 1) % SEEN_MAX;
    return false;
}

/* The remembered table of the file, if it is made of this very text; else NULL. */
static struct stx_shared_header *look_up(const struct stx_header_key *key, const char *text,
                                         uint64_t json_bytes) {
    struct stx_shared_header *entry = NULL;
    lock_cache();
    const size_t index = find(key);
    if (index != ENTRIES_MAX && cache.entries[index]->json_bytes == json_bytes) {
        entry = cache.entries[index];
        entry->used_at = ++cache.clock;
        atomic_fetch_add_explicit(&entry->users, 1, memory_order_relaxed);
    }
    unlock_cache();
    if (entry == NULL) return NULL;
    if (memcmp(entry->text + STX_HEADER_PREFIX_BYTES, text + STX_HEADER_PREFIX_BYTES,
               (size_t)json_bytes) == 0)
        return entry;
    stx_shared_header_release(entry);
    return NULL;
}

/* Put a new table into the list, with its text, if the file was opened before. */
static void remember(struct stx_shared_header *shared, char **text) {
    if (!cache.is_fork_safe || shared->json_bytes > TEXT_BYTES_MAX) return;
    lock_cache();
    const size_t before = find(&shared->key);
    if (before != ENTRIES_MAX) forget(before);
    if (was_seen(&shared->key)) {
        while (cache.entries_count == ENTRIES_MAX ||
               cache.texts_bytes + shared->json_bytes > TEXTS_BYTES_MAX)
            forget(find_oldest());
        char *const shrunk = realloc(*text, (size_t)(STX_HEADER_PREFIX_BYTES + shared->json_bytes));
        shared->text = shrunk != NULL ? shrunk : *text;
        *text = NULL;
        shared->number = ++cache.numbers;
        shared->used_at = ++cache.clock;
        atomic_fetch_add_explicit(&shared->users, 1, memory_order_relaxed);
        cache.texts_bytes += shared->json_bytes;
        cache.entries[cache.entries_count++] = shared;
    }
    unlock_cache();
}

enum stx_status stx_header_cache_get(struct stx_shared_header **shared, bool *reused,
                                     const struct stx_header_key *key, char **text,
                                     uint64_t json_bytes, struct stx_err *err) {
    (void)pthread_once(&cache.once, prepare);
    struct stx_shared_header *made = cache.is_fork_safe ? look_up(key, *text, json_bytes) : NULL;
    *reused = made != NULL;
    if (made != NULL) {
        *shared = made;
        return STX_OK;
    }
    made = calloc(1, sizeof *made);
    if (made == NULL) return stx_err_set(err, STX_ERR_MEMORY, "no memory for a header");
    const enum stx_status status = stx_header_parse(&made->header, *text + STX_HEADER_PREFIX_BYTES,
                                                    json_bytes, key->file_size_bytes, err);
    if (status != STX_OK) {
        free(made);
        return status;
    }
    atomic_init(&made->users, 1);
    made->key = *key;
    made->json_bytes = json_bytes;
    remember(made, text);
    *shared = made;
    return STX_OK;
}

const struct stx_header *stx_shared_header_table(const struct stx_shared_header *shared) {
    return &shared->header;
}

uint64_t stx_shared_header_number(const struct stx_shared_header *shared) { return shared->number; }

void stx_shared_header_release(struct stx_shared_header *shared) {
    if (shared == NULL) return;
    if (atomic_fetch_sub_explicit(&shared->users, 1, memory_order_acq_rel) != 1) return;
    stx_header_free(&shared->header);
    free(shared->text);
    free(shared);
}
