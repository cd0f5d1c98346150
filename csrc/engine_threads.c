/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine that is always there: threads that each do one pread at a time.
 *
 * First-class, not an emergency: containers mostly forbid io_uring, and with large requests a few
 * threads are as fast. Guarantees: threads are made when requests wait for one, at most as many as
 * asked for; they block all signals, so that handlers run where the program expects them; close
 * forgets what has not begun, waits for what has, and joins them all. One lock guards everything;
 * no thread holds it while it reads. Completions come in any order.
 */
#include "engine.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "thread.h"

#define THREADS_DEFAULT 4

struct pool {
    pthread_mutex_t lock;
    pthread_cond_t work;     /* a request was queued, or the pool stops */
    pthread_cond_t finished; /* a completion was posted */
    uint32_t queue_first;
    uint32_t queue_count;
    uint32_t done_first;
    uint32_t done_count;
    uint32_t idle; /* threads that wait for work */
    uint32_t threads_count;
    uint32_t threads_max;
    bool stopping;
    struct stx_io queue[STX_ENGINE_DEPTH_MAX];
    struct stx_io_done done[STX_ENGINE_DEPTH_MAX];
    pthread_t threads[STX_ENGINE_DEPTH_MAX];
};

static void *work(void *argument) {
    struct pool *const pool = argument;
    (void)pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (pool->queue_count == 0 && !pool->stopping) {
            pool->idle++;
            (void)pthread_cond_wait(&pool->work, &pool->lock);
            pool->idle--;
        }
        if (pool->stopping) break;
        const struct stx_io io = pool->queue[pool->queue_first];
        pool->queue_first = (pool->queue_first + 1) % STX_ENGINE_DEPTH_MAX;
        pool->queue_count--;
        (void)pthread_mutex_unlock(&pool->lock);
        const ssize_t got = pread(io.fd, io.buffer, io.size_bytes, (off_t)io.offset_bytes);
        const int32_t result = got < 0 ? -errno : (int32_t)got;
        (void)pthread_mutex_lock(&pool->lock);
        assert(pool->done_count < STX_ENGINE_DEPTH_MAX);
        pool->done[(pool->done_first + pool->done_count) % STX_ENGINE_DEPTH_MAX] =
            (struct stx_io_done){.tag = io.tag, .result = result};
        pool->done_count++;
        (void)pthread_cond_signal(&pool->finished);
    }
    (void)pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* One more thread; 0, or an errno value. */
static int start_thread(struct pool *pool) {
    const int failure = stx_thread_start(&pool->threads[pool->threads_count], work, pool);
    if (failure == 0) pool->threads_count++;
    return failure;
}

static uint32_t choose_threads(uint32_t asked) {
    if (asked != 0) return asked < STX_ENGINE_DEPTH_MAX ? asked : STX_ENGINE_DEPTH_MAX;
    const long processors = sysconf(_SC_NPROCESSORS_ONLN);
    return processors > 0 && processors < THREADS_DEFAULT ? (uint32_t)processors : THREADS_DEFAULT;
}

static void free_pool(struct pool *pool) {
    (void)pthread_cond_destroy(&pool->finished);
    (void)pthread_cond_destroy(&pool->work);
    (void)pthread_mutex_destroy(&pool->lock);
    free(pool);
}

static enum stx_status open_threads(struct stx_engine *engine,
                                    const struct stx_engine_options *options, struct stx_err *err) {
    struct pool *const pool = calloc(1, sizeof *pool);
    if (pool == NULL) return stx_err_set(err, STX_ERR_MEMORY, "no memory for a pool of threads");
    (void)pthread_mutex_init(&pool->lock, NULL);
    (void)pthread_cond_init(&pool->work, NULL);
    stx_thread_condition_init(&pool->finished);
    pool->threads_max = choose_threads(options->threads_count);
    /* The first one now, so that whoever submits has a thread to wait for. */
    const int failure = start_thread(pool);
    if (failure != 0) {
        free_pool(pool);
        return stx_err_set_errno(err, failure, "pthread_create");
    }
    engine->state = pool;
    return STX_OK;
}

static enum stx_status submit(struct stx_engine *engine, const struct stx_io *io,
                              struct stx_err *err) {
    struct pool *const pool = engine->state;
    (void)err;
    (void)pthread_mutex_lock(&pool->lock);
    assert(pool->queue_count < STX_ENGINE_DEPTH_MAX);
    pool->queue[(pool->queue_first + pool->queue_count) % STX_ENGINE_DEPTH_MAX] = *io;
    pool->queue_count++;
    /* Refused: those that are there do it. */
    if (pool->queue_count > pool->idle && pool->threads_count < pool->threads_max)
        (void)start_thread(pool);
    (void)pthread_cond_signal(&pool->work);
    (void)pthread_mutex_unlock(&pool->lock);
    return STX_OK;
}

static enum stx_status reap(struct stx_engine *engine, struct stx_io_done done[], uint32_t capacity,
                            uint32_t timeout_ms, uint32_t *count, struct stx_err *err) {
    struct pool *const pool = engine->state;
    const struct timespec until = stx_thread_deadline(CLOCK_MONOTONIC, timeout_ms);
    (void)err;
    (void)pthread_mutex_lock(&pool->lock);
    while (pool->done_count == 0)
        if (pthread_cond_timedwait(&pool->finished, &pool->lock, &until) != 0) break;
    while (pool->done_count != 0 && *count < capacity) {
        done[(*count)++] = pool->done[pool->done_first];
        pool->done_first = (pool->done_first + 1) % STX_ENGINE_DEPTH_MAX;
        pool->done_count--;
    }
    (void)pthread_mutex_unlock(&pool->lock);
    return STX_OK;
}

static void close_threads(struct stx_engine *engine) {
    struct pool *const pool = engine->state;
    (void)pthread_mutex_lock(&pool->lock);
    pool->stopping = true;
    (void)pthread_cond_broadcast(&pool->work);
    (void)pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->threads_count; i++) (void)pthread_join(pool->threads[i], NULL);
    free_pool(pool);
}

const struct stx_engine_ops stx_engine_threads = {
    .name = "threads",
    .open = open_threads,
    .submit = submit,
    .reap = reap,
    .close = close_threads,
};
