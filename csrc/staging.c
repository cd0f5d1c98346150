/* SPDX-License-Identifier: Apache-2.0
 *
 * Slots are FREE, READING (somebody's) or COPYING (their mark has not come yet), under one lock
 * that is not held while anybody waits for the device.
 */
#include "staging.h"

#include <assert.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "checked.h"
#include "memory.h"
#include "thread.h"
#include "trace.h"

#define DEVICES_MAX 64

#define TRIES 3

/* A slot is LOST when its mark could not be set, until all copies have happened. */
enum state { FREE, READING, COPYING, LOST };

struct slot {
    enum state state;
    uint64_t turn; /* of its copies; the lowest come first */
    void *mark;
    uint64_t sent_ns; /* while somebody records */
    uint64_t sent_bytes;
};

struct stx_staging {
    struct stx_device device;
    char *mapping; /* with room for alignment */
    size_t mapping_bytes;
    char *memory;
    bool pinned;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t change;
    uint64_t turns;
    uint32_t slots_count;
    struct slot slots[];
};

/* --- life --- */

/* Memory on huge pages where the system has them: there is less to pin. */
static bool map_memory(struct stx_staging *staging, size_t size_bytes) {
    staging->mapping_bytes = size_bytes + STX_HUGE_PAGE_BYTES;
    void *const mapping = mmap(NULL, staging->mapping_bytes, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return false;
    staging->mapping = mapping;
    staging->memory = (char *)stx_align_up((uint64_t)(uintptr_t)mapping, STX_HUGE_PAGE_BYTES);
    (void)madvise(staging->memory, size_bytes, MADV_HUGEPAGE);
    (void)madvise(staging->memory, size_bytes, MADV_DONTFORK); /* pinned pages are not copied */
    return true;
}

/* Between enter and leave. */
static void release(struct stx_staging *staging) {
    struct stx_device *const device = &staging->device;
    if (staging->pinned) device->ops->unpin(device, staging->memory);
    for (uint32_t i = 0; i < staging->slots_count; i++)
        if (staging->slots[i].mark != NULL) device->ops->mark_free(device, staging->slots[i].mark);
    device->ops->close(device);
    if (staging->mapping != NULL) (void)munmap(staging->mapping, staging->mapping_bytes);
    (void)pthread_cond_destroy(&staging->change);
    (void)pthread_mutex_destroy(&staging->lock);
    free(staging);
}

void stx_staging_close(struct stx_staging *staging) {
    if (staging == NULL) return;
    struct stx_device device = staging->device;
    struct stx_err ignored;
    int before = 0;
    const enum stx_status status = device.ops->enter(&device, &before, &ignored);
    release(staging);
    if (status == STX_OK) device.ops->leave(&device, before);
}

/* Between enter and leave. */
static enum stx_status open_here(struct stx_staging **staging, const struct stx_device *device,
                                 uint64_t size_bytes, struct stx_err *err) {
    const uint64_t slots = stx_max_u64(size_bytes / STX_STAGING_SLOT_BYTES, STX_STAGING_SLOTS_MIN);
    const uint32_t count = (uint32_t)stx_min_u64(slots, 4096);
    const size_t memory_bytes = (size_t)(count * STX_STAGING_SLOT_BYTES);
    struct stx_staging *opened = calloc(1, sizeof *opened + count * sizeof opened->slots[0]);
    if (opened == NULL) return stx_err_set(err, STX_ERR_MEMORY, "no memory for staging");
    opened->device = *device;
    opened->slots_count = count;
    (void)pthread_mutex_init(&opened->lock, NULL);
    stx_thread_condition_init(&opened->change);
    enum stx_status status = device->ops->open(&opened->device, err);
    for (uint32_t i = 0; status == STX_OK && i < count; i++)
        status = device->ops->mark_init(&opened->device, &opened->slots[i].mark, err);
    if (status == STX_OK && !map_memory(opened, memory_bytes))
        status = stx_err_set(err, STX_ERR_MEMORY, "no memory for staging");
    if (status != STX_OK) {
        release(opened);
        return status;
    }
    opened->pinned = device->ops->pin(&opened->device, opened->memory, memory_bytes);
    *staging = opened;
    return STX_OK;
}

enum stx_status stx_staging_open(struct stx_staging **staging, const struct stx_device *device,
                                 uint64_t size_bytes, struct stx_err *err) {
    struct stx_device here = *device;
    int before = 0;
    STX_TRY(device->ops->enter(&here, &before, err));
    const enum stx_status status = open_here(staging, device, size_bytes, err);
    device->ops->leave(&here, before);
    return status;
}

/* --- one for the process --- */

static pthread_mutex_t rings_lock = PTHREAD_MUTEX_INITIALIZER;
static struct stx_staging *rings[DEVICES_MAX];
static const struct stx_device_ops *rings_ops;
static pid_t rings_process;

enum stx_status stx_staging_get(struct stx_staging **staging, const struct stx_device_ops *ops,
                                int index, uint64_t size_bytes, struct stx_err *err) {
    if (index < 0 || index >= DEVICES_MAX)
        return stx_err_set(err, STX_ERR_UNSUPPORTED, "no device has the number %d", index);
    const struct stx_device device = {.ops = ops, .index = index};
    enum stx_status status = STX_OK;
    (void)pthread_mutex_lock(&rings_lock);
    if (rings_process != getpid() || rings_ops != ops) { /* the parent's are out of reach */
        for (size_t i = 0; i < DEVICES_MAX; i++) rings[i] = NULL;
        rings_process = getpid();
        rings_ops = ops;
    }
    if (rings[index] == NULL) status = stx_staging_open(&rings[index], &device, size_bytes, err);
    if (status == STX_OK) *staging = rings[index];
    (void)pthread_mutex_unlock(&rings_lock);
    return status;
}

struct stx_device *stx_staging_device(struct stx_staging *staging) {
    return &staging->device;
}

bool stx_staging_is_pinned(const struct stx_staging *staging) { return staging->pinned; }

/* --- slots --- */

static char *memory_of(struct stx_staging *staging, const struct slot *slot) {
    return staging->memory + (size_t)(slot - staging->slots) * STX_STAGING_SLOT_BYTES;
}

static struct slot *slot_of(struct stx_staging *staging, const char *memory) {
    const size_t index = (size_t)(memory - staging->memory) / STX_STAGING_SLOT_BYTES;
    assert(index < staging->slots_count && staging->slots[index].state == READING);
    return &staging->slots[index];
}

/* Its copies have happened. Under the lock. */
static void set_free(struct stx_staging *staging, struct slot *slot) {
    slot->state = FREE;
    STX_TRACE(STX_TRACE_DEVICE_COPY, slot->sent_ns, 0, staging->device.ops->name,
              (uint64_t)(slot - staging->slots), slot->sent_bytes);
    slot->sent_ns = 0;
}

/* A free slot, after asking for the marks of those that are being copied; and of these the one
 * whose copies come first. Under the lock. */
static enum stx_status find(struct stx_staging *staging, struct slot **free_slot,
                            struct slot **first, struct stx_err *err) {
    struct stx_device *const device = &staging->device;
    uint32_t lost_count = 0;
    *free_slot = *first = NULL;
    for (uint32_t i = 0; i < staging->slots_count; i++) {
        struct slot *const slot = &staging->slots[i];
        bool has_come = false;
        if (slot->state == COPYING) {
            STX_TRY(device->ops->mark_ask(device, slot->mark, &has_come, err));
            if (has_come) set_free(staging, slot);
        }
        lost_count += slot->state == LOST;
        if (slot->state == FREE && *free_slot == NULL) *free_slot = slot;
        if (slot->state == COPYING && (*first == NULL || slot->turn < (*first)->turn))
            *first = slot;
    }
    if (lost_count == staging->slots_count)
        return stx_err_set(err, STX_ERR_DEVICE, "the device does not answer any more");
    return STX_OK;
}

enum stx_status stx_staging_take(struct stx_staging *staging, uint32_t wait_ms, char **memory,
                                 struct stx_err *err) {
    struct stx_device *const device = &staging->device;
    const struct timespec until = stx_thread_deadline(CLOCK_MONOTONIC, wait_ms);
    struct slot *found = NULL, *first = NULL;
    enum stx_status status;
    uint64_t wait_ns = 0;
    bool waited = wait_ms == 0;
    *memory = NULL;
    (void)pthread_mutex_lock(&staging->lock);
    for (;;) {
        status = find(staging, &found, &first, err);
        if (status != STX_OK || found != NULL || waited) break;
        waited = true;
        wait_ns = stx_trace_begin();
        if (first != NULL) {
            void *const mark = first->mark; /* set anew meanwhile, it comes later: no harm */
            (void)pthread_mutex_unlock(&staging->lock);
            status = device->ops->mark_wait(device, mark, err);
            (void)pthread_mutex_lock(&staging->lock);
            if (status != STX_OK) break;
        } else { /* others are reading into all of them */
            (void)pthread_cond_timedwait(&staging->change, &staging->lock, &until);
        }
    }
    if (status == STX_OK && found != NULL) {
        found->state = READING;
        *memory = memory_of(staging, found);
    }
    (void)pthread_mutex_unlock(&staging->lock);
    STX_TRACE(STX_TRACE_WAIT, wait_ns, 0, "slot", 0);
    return status;
}

static void set_state(struct stx_staging *staging, char *memory, enum state state) {
    (void)pthread_mutex_lock(&staging->lock);
    struct slot *const slot = slot_of(staging, memory);
    slot->state = state;
    slot->turn = staging->turns++;
    (void)pthread_cond_broadcast(&staging->change);
    (void)pthread_mutex_unlock(&staging->lock);
}

enum stx_status stx_staging_send(struct stx_staging *staging, char *memory, uint64_t size_bytes,
                                 struct stx_err *err) {
    struct stx_device *const device = &staging->device;
    struct slot *const slot = slot_of(staging, memory); /* the caller's while it is READING */
    slot->sent_ns = stx_trace_begin();
    slot->sent_bytes = size_bytes;
    const enum stx_status status = device->ops->mark_set(device, slot->mark, err);
    set_state(staging, memory, status == STX_OK ? COPYING : LOST);
    return status;
}

enum stx_status stx_staging_drain(struct stx_staging *staging, void *mark, struct stx_err *err) {
    struct stx_device *const device = &staging->device;
    enum stx_status first = STX_OK, status = STX_ERR_DEVICE;
    const uint64_t wait_ns = stx_trace_begin();
    struct stx_err late;
    (void)pthread_mutex_lock(&staging->lock);
    const uint64_t turn = staging->turns;
    (void)pthread_mutex_unlock(&staging->lock);
    for (int tries = 0; status != STX_OK && tries < TRIES; tries++) {
        struct stx_err *const told = first == STX_OK ? err : &late;
        status = device->ops->mark_set(device, mark, told);
        if (status == STX_OK) status = device->ops->mark_wait(device, mark, told);
        if (first == STX_OK) first = status;
    }
    STX_TRACE(STX_TRACE_WAIT, wait_ns, 0, "device", 0);
    if (status != STX_OK) return first;
    (void)pthread_mutex_lock(&staging->lock);
    for (uint32_t i = 0; i < staging->slots_count; i++) {
        struct slot *const slot = &staging->slots[i];
        const bool was_sent = slot->state == LOST || slot->state == COPYING;
        if (was_sent && slot->turn < turn) set_free(staging, slot); /* whatever its mark says */
    }
    (void)pthread_mutex_unlock(&staging->lock);
    return first;
}

void stx_staging_give_back(struct stx_staging *staging, char *memory) {
    set_state(staging, memory, FREE);
}
