/* SPDX-License-Identifier: Apache-2.0
 *
 * Threads that do system calls for others: small stacks, all signals blocked, so that handlers run
 * where the program expects them. They never touch Python.
 */
#ifndef STX_THREAD_H
#define STX_THREAD_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

/* Start `function` with `context` in a new thread, which is to be joined unless `thread` is NULL.
 * 0, or an errno value. */
int stx_thread_start(pthread_t *thread, void *(*function)(void *context), void *context);

/* When `timeout_ms` from now are over, by `clock`. */
struct timespec stx_thread_deadline(clockid_t clock, uint32_t timeout_ms);

/* A condition variable that waits by CLOCK_MONOTONIC. */
void stx_thread_condition_init(pthread_cond_t *condition);

#endif
