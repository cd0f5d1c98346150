/* SPDX-License-Identifier: Apache-2.0
 *
 * The helpers, and what each mapping wants of them.
 *
 * DESIGN. One lock guards everything; it is taken once per tensor asked for and once per block of
 * work, never by whoever drops a tensor. A mapping with work is in the pool's queue and has the
 * pool as a holder; helpers serve the oldest first, since that is the shard a consumer waits for.
 * What is wanted now comes before what will be. A helper takes up to 8 MiB at a time, starts the
 * reads of all of it (MADV_WILLNEED), then waits for them by entering the pages into the page table
 * (MADV_POPULATE_READ), which spares the consumer the faults as well. Helpers are made when there
 * is work and leave when there has been none for a while, so an idle process has none.
 *
 * fork: the child has no helpers; what they were doing is forgotten there, and their holds with it.
 */
#include "readahead.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "checked.h"
#include "thread.h"
#include "trace.h"

#define THREADS_MAX 4
#define IDLE_MS 200
#define BLOCK_BYTES (UINT64_C(8) << 20)
/* Ranges that a helper takes at a time; together at most BLOCK_BYTES. */
#define BATCH_RANGES 64
/* Tensors that are asked for faster than they can be read; more are left to the page faults. */
#define URGENT_MAX 64
/* Up to here, starting a read is left to the thread that wants it. */
#define INLINE_BYTES (UINT64_C(4) << 20)

/* What one mapping wants. Lives with the mapping; `lock` guards it. */
struct wants {
    struct stx_mapping_notes notes; /* first: the mapping's pointer to this */
    struct stx_mapping *mapping;
    struct wants *next; /* in the queue */
    bool queued;        /* the pool is a holder of the mapping */
    bool prepared;
    bool dense;       /* all of it is wanted; else a fault must not read around itself meanwhile */
    unsigned helpers; /* reading for it just now */
    unsigned urgent_first;
    unsigned urgent_count;
    struct stx_range urgent[URGENT_MAX];
    struct stx_follow follow;
};

static struct {
    struct wants *queue;
    unsigned threads;
    unsigned idle;
    struct stx_readahead_sums sums;
    bool initialised;
} pool;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER;    /* something was queued */
static pthread_cond_t settled = PTHREAD_COND_INITIALIZER; /* the queue became empty */

/* --- fork --- */

static void before_fork(void) { (void)pthread_mutex_lock(&lock); }

static void after_fork_in_parent(void) { (void)pthread_mutex_unlock(&lock); }

static void after_fork_in_child(void) {
    struct wants *queue = pool.queue;
    pool.queue = NULL;
    pool.threads = 0;
    pool.idle = 0;
    (void)pthread_cond_init(&work, NULL);
    (void)pthread_cond_init(&settled, NULL);
    (void)pthread_mutex_unlock(&lock);
    while (queue != NULL) {
        struct wants *const wants = queue;
        queue = wants->next;
        wants->queued = false;
        wants->helpers = 0;
        stx_mapping_drop(wants->mapping);
    }
}

/* --- the queue; all with the lock held --- */

static bool has_work(struct wants *wants) {
    return wants->urgent_count != 0 || stx_follow_has_next(&wants->follow);
}

static void forget_work(struct wants *wants) {
    wants->urgent_count = 0;
    wants->follow.cursor = wants->follow.count;
    wants->follow.given_bytes = 0;
}

static void enqueue(struct wants *wants) {
    struct wants **end = &pool.queue;
    if (wants->queued) return;
    if (!wants->dense) stx_mapping_expect_random(wants->mapping);
    while (*end != NULL) end = &(*end)->next;
    stx_mapping_hold(wants->mapping);
    wants->next = NULL;
    wants->queued = true;
    *end = wants;
}

/* Take `wants` out of the queue if nothing is left to do. Its mapping is then the caller's to drop,
 * without the lock; else NULL. */
static struct stx_mapping *retire(struct wants *wants) {
    struct wants **at = &pool.queue;
    if (wants->helpers != 0 || has_work(wants)) return NULL;
    while (*at != wants) at = &(*at)->next;
    *at = wants->next;
    wants->queued = false;
    if (pool.queue == NULL) (void)pthread_cond_broadcast(&settled);
    return wants->mapping;
}

/* Add one range of `mapping` to the sums: whole pages, as far as the file goes; answers those. */
static uint64_t count_read(const struct stx_mapping *mapping, const struct stx_range *range) {
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    const uint64_t end =
        stx_min_u64(stx_align_up(range->end_bytes, page), stx_mapping_size_bytes(mapping));
    const uint64_t whole_bytes = end - stx_align_down(range->begin_bytes, page);
    pool.sums.requests++;
    pool.sums.bytes += whole_bytes;
    pool.sums.over_bytes += whole_bytes - (range->end_bytes - range->begin_bytes);
    return whole_bytes;
}

static bool take_urgent(struct wants *wants, struct stx_range *range) {
    if (wants->urgent_count == 0) return false;
    struct stx_range *const first = &wants->urgent[wants->urgent_first];
    *range = *first;
    range->end_bytes = stx_min_u64(range->end_bytes,
                                   stx_align_down(range->begin_bytes, BLOCK_BYTES) + BLOCK_BYTES);
    first->begin_bytes = range->end_bytes;
    if (first->begin_bytes < first->end_bytes) return true;
    wants->urgent_first = (wants->urgent_first + 1) % URGENT_MAX;
    wants->urgent_count--;
    return true;
}

/* The next block of work: up to BATCH_RANGES ranges, neighbours joined, and its whole pages. */
static size_t take(struct wants *wants, struct stx_range batch[], uint64_t *read_bytes) {
    struct stx_range range;
    uint64_t total_bytes = 0;
    size_t count = 0;
    while (count < BATCH_RANGES && total_bytes < BLOCK_BYTES) {
        if (!take_urgent(wants, &range) && !stx_follow_next(&wants->follow, BLOCK_BYTES, &range))
            break;
        *read_bytes += count_read(wants->mapping, &range);
        total_bytes += range.end_bytes - range.begin_bytes;
        if (count != 0 && batch[count - 1].end_bytes == range.begin_bytes)
            batch[count - 1].end_bytes = range.end_bytes;
        else
            batch[count++] = range;
    }
    return count;
}

/* --- helpers --- */

/* Read a batch; false where the file does not have it any more. */
static bool read_batch(const struct stx_mapping *mapping, const struct stx_range batch[],
                       size_t count) {
    struct stx_err err;
    for (size_t i = 0; i < count; i++)
        stx_mapping_will_need(mapping, batch[i].begin_bytes, batch[i].end_bytes);
    for (size_t i = 0; i < count && stx_mapping_is_used(mapping); i++)
        if (stx_mapping_populate(mapping, batch[i].begin_bytes, batch[i].end_bytes, &err) ==
            STX_ERR_IO)
            return false;
    return true;
}

/* Serve `wants` once. Called and left with the lock held, which is open meanwhile. */
static void serve(struct wants *wants) {
    struct stx_range batch[BATCH_RANGES];
    struct stx_mapping *const mapping = wants->mapping;
    const uint64_t begin_ns = stx_trace_begin();
    uint64_t read_bytes = 0;
    if (!stx_mapping_is_used(mapping)) forget_work(wants);
    const size_t count = take(wants, batch, &read_bytes);
    wants->helpers++;
    (void)pthread_mutex_unlock(&lock);
    const bool whole = read_batch(mapping, batch, count);
    if (count != 0)
        STX_TRACE(STX_TRACE_READ_AHEAD, begin_ns, stx_mapping_label(mapping),
                  whole ? NULL : "truncated", batch[0].begin_bytes, count, read_bytes);
    (void)pthread_mutex_lock(&lock);
    wants->helpers--;
    if (!whole) {
        pool.sums.failures++;
        forget_work(wants);
    }
    struct stx_mapping *const left = retire(wants);
    if (left == NULL) return;
    if (!wants->dense) stx_mapping_expect_sequential(left); /* faults are on their own again */
    (void)pthread_mutex_unlock(&lock);
    stx_mapping_drop(left);
    (void)pthread_mutex_lock(&lock);
}

/* The first in the queue to be served: it has work, or had some that a demand has made void. */
static struct wants *find_work(void) {
    struct wants *wants = pool.queue;
    while (wants != NULL && wants->helpers != 0 && !has_work(wants)) wants = wants->next;
    return wants;
}

static void *help(void *unused) {
    (void)unused;
    (void)pthread_mutex_lock(&lock);
    for (;;) {
        struct wants *const wants = find_work();
        if (wants != NULL) {
            serve(wants);
            continue;
        }
        const struct timespec until = stx_thread_deadline(CLOCK_REALTIME, IDLE_MS);
        pool.idle++;
        const int waited = pthread_cond_timedwait(&work, &lock, &until);
        pool.idle--;
        if (waited == ETIMEDOUT && find_work() == NULL) break;
    }
    pool.threads--;
    (void)pthread_mutex_unlock(&lock);
    return NULL;
}

/* Queue what has work and see to helpers for it. With the lock held. Where no helper can be made,
 * the work is forgotten: page faults do it. */
static void begin_work(struct wants *wants) {
    if (!has_work(wants)) return;
    if (!pool.initialised)
        pool.initialised =
            pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child) == 0;
    while (pool.initialised && pool.idle == 0 && pool.threads < THREADS_MAX &&
           stx_thread_start(NULL, help, NULL) == 0)
        pool.threads++;
    if (pool.threads == 0) {
        forget_work(wants);
        return;
    }
    enqueue(wants);
    (void)pthread_cond_broadcast(&work);
}

/* --- a mapping's wants --- */

static void free_wants(struct stx_mapping_notes *notes) {
    struct wants *wants = (struct wants *)notes;
    stx_follow_free(&wants->follow);
    free(wants);
}

/* The wants of a mapping, made if need be; NULL without memory. */
static struct wants *wants_of(struct stx_mapping *mapping) {
    struct wants *wants = (struct wants *)stx_mapping_notes(mapping);
    if (wants != NULL) return wants;
    wants = calloc(1, sizeof *wants);
    if (wants == NULL) return NULL;
    wants->notes.free = free_wants;
    wants->mapping = mapping;
    if (stx_mapping_set_notes(mapping, &wants->notes)) return wants;
    free(wants);
    return (struct wants *)stx_mapping_notes(mapping);
}

static void add_urgent(struct wants *wants, struct stx_range range) {
    if (wants->urgent_count == URGENT_MAX) return;
    wants->urgent[(wants->urgent_first + wants->urgent_count) % URGENT_MAX] = range;
    wants->urgent_count++;
}

void stx_readahead_all(struct stx_mapping *mapping, struct stx_range *ranges, size_t count,
                       bool dense, uint64_t limit_bytes) {
    struct stx_err err;
    struct stx_follow follow;
    struct wants *wants = wants_of(mapping);
    if (stx_follow_init_all(&follow, ranges, count, limit_bytes, &err) != STX_OK) return;
    if (wants == NULL) {
        stx_follow_free(&follow);
        return;
    }
    if (dense) stx_mapping_expect_all(mapping);
    (void)pthread_mutex_lock(&lock);
    struct stx_follow before = wants->follow;
    wants->follow = follow;
    wants->prepared = true;
    wants->dense = dense;
    begin_work(wants);
    (void)pthread_mutex_unlock(&lock);
    stx_follow_free(&before);
}

/* By whoever is better at it. With no lock held. */
void stx_readahead_one(struct stx_mapping *mapping, uint64_t begin_bytes, uint64_t end_bytes) {
    const struct stx_range range = {begin_bytes, end_bytes};
    const uint64_t begin_ns = stx_trace_begin();
    uint64_t read_bytes = 0;
    if (begin_bytes >= end_bytes) return;
    struct wants *const wants = end_bytes - begin_bytes <= INLINE_BYTES ? NULL : wants_of(mapping);
    if (wants == NULL) stx_mapping_will_need(mapping, begin_bytes, end_bytes);
    (void)pthread_mutex_lock(&lock);
    if (wants == NULL) {
        read_bytes = count_read(mapping, &range);
    } else {
        add_urgent(wants, range);
        begin_work(wants);
    }
    (void)pthread_mutex_unlock(&lock);
    if (wants == NULL)
        STX_TRACE(STX_TRACE_READ_AHEAD, begin_ns, stx_mapping_label(mapping), NULL, begin_bytes, 1,
                  read_bytes);
}

void stx_readahead_prepare(struct stx_mapping *mapping, struct stx_range *tensors, size_t count,
                           uint32_t *orders[STX_FOLLOW_ORDERS - 1], bool dense,
                           uint64_t limit_bytes) {
    struct stx_err err;
    struct stx_follow follow;
    struct wants *wants = wants_of(mapping);
    if (stx_follow_init(&follow, tensors, count, orders, limit_bytes, &err) != STX_OK) return;
    (void)pthread_mutex_lock(&lock);
    const bool is_first = wants != NULL && !wants->prepared;
    if (is_first) {
        wants->follow = follow;
        wants->prepared = true;
        wants->dense = dense;
    }
    (void)pthread_mutex_unlock(&lock);
    if (!is_first) stx_follow_free(&follow);
    if (is_first && dense) stx_mapping_expect_all(mapping);
}

bool stx_readahead_is_prepared(const struct stx_mapping *mapping) {
    const struct wants *wants = (const struct wants *)stx_mapping_notes(mapping);
    if (wants == NULL) return false;
    (void)pthread_mutex_lock(&lock);
    const bool prepared = wants->prepared;
    (void)pthread_mutex_unlock(&lock);
    return prepared;
}

static bool is_resident(const struct stx_mapping *mapping, uint64_t begin_bytes,
                        uint64_t end_bytes) {
    uint32_t resident_pages = 0, asked_pages = 0;
    stx_mapping_sample(mapping, begin_bytes, end_bytes, &resident_pages, &asked_pages);
    return resident_pages == asked_pages;
}

void stx_readahead_demand(struct stx_mapping *mapping, size_t index, uint64_t begin_bytes,
                          uint64_t end_bytes) {
    struct wants *wants = (struct wants *)stx_mapping_notes(mapping);
    struct stx_range missing = {begin_bytes, end_bytes};
    bool again = false;
    if (wants == NULL) return;
    (void)pthread_mutex_lock(&lock);
    const struct stx_follow *follow = &wants->follow;
    if (wants->prepared && index < follow->count) {
        const struct stx_range whole = follow->tensors[index];
        again = follow->taken[index] == STX_FOLLOW_DEMANDED;
        if (whole.begin_bytes == begin_bytes && whole.end_bytes == end_bytes) {
            missing = stx_follow_demand(&wants->follow, index);
            begin_work(wants);
        } else if (follow->taken[index] != 0) {
            missing = (struct stx_range){0, 0};
        }
    }
    (void)pthread_mutex_unlock(&lock);
    if (again && !is_resident(mapping, begin_bytes, end_bytes)) /* the system took it back */
        missing = (struct stx_range){begin_bytes, end_bytes};
    stx_readahead_one(mapping, missing.begin_bytes, missing.end_bytes);
}

/* --- sums --- */

struct stx_readahead_sums stx_readahead_count(void) {
    (void)pthread_mutex_lock(&lock);
    struct stx_readahead_sums sums = pool.sums;
    sums.threads = pool.threads;
    (void)pthread_mutex_unlock(&lock);
    return sums;
}

bool stx_readahead_settle(uint32_t timeout_ms) {
    const struct timespec until = stx_thread_deadline(CLOCK_REALTIME, timeout_ms);
    int waited = 0;
    (void)pthread_mutex_lock(&lock);
    while (pool.queue != NULL && waited == 0)
        waited = pthread_cond_timedwait(&settled, &lock, &until);
    const bool is_settled = pool.queue == NULL;
    (void)pthread_mutex_unlock(&lock);
    return is_settled;
}
