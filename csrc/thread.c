/* SPDX-License-Identifier: Apache-2.0
 *
 * Starts threads. A process with much thread-local data may not fit it on a small stack: then the
 * thread gets the default one.
 */
#include "thread.h"

#include <errno.h>
#include <signal.h>

#define STACK_BYTES ((size_t)256 << 10)

int stx_thread_start(pthread_t *thread, void *(*function)(void *context), void *context) {
    pthread_attr_t attributes;
    pthread_t unnamed;
    sigset_t all, before;
    pthread_t *const started = thread == NULL ? &unnamed : thread;
    int failure = pthread_attr_init(&attributes);
    if (failure != 0) return failure;
    if (thread == NULL) (void)pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    (void)pthread_attr_setstacksize(&attributes, STACK_BYTES);
    failure = pthread_create(started, &attributes, function, context);
    if (failure == EINVAL) {
        (void)pthread_attr_destroy(&attributes);
        (void)pthread_attr_init(&attributes);
        if (thread == NULL) (void)pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        failure = pthread_create(started, &attributes, function, context);
    }
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    (void)pthread_attr_destroy(&attributes);
    return failure;
}

struct timespec stx_thread_deadline(clockid_t clock, uint32_t timeout_ms) {
    struct timespec at;
    (void)clock_gettime(clock, &at);
    at.tv_sec += timeout_ms / 1000;
    at.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (at.tv_nsec >= 1000000000) {
        at.tv_sec++;
        at.tv_nsec -= 1000000000;
    }
    return at;
}

void stx_thread_condition_init(pthread_cond_t *condition) {
    pthread_condattr_t attributes;
    (void)pthread_condattr_init(&attributes);
    (void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    (void)pthread_cond_init(condition, &attributes);
    (void)pthread_condattr_destroy(&attributes);
}
