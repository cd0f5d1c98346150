/* SPDX-License-Identifier: Apache-2.0
 *
 * A CUDA runtime without a device: the calls of csrc/device_cuda.c, for tests on any machine.
 *
 * Device memory is memory. What is given to a stream happens later, in a thread of that stream, and
 * a target is poisoned before its copy: a missing wait and a slot that is used too early both show
 * as wrong bytes. The environment makes it
 * slow or faulty:
 *
 *   STX_FAKE_DELAY_US=n       each copy takes at least that long
 *   STX_FAKE_FAIL=name:k      call number k (from 1) of that name fails; "any:k" of all of them
 *   STX_FAKE_FAIL_ALL=name    every call of that name fails
 *
 * fake_cudart_live() counts streams, events and registrations that were not given back;
 * fake_cudart_calls() calls, by name or of all ("any"); fake_cudart_reset() sets counts to zero and
 * reads the environment again.
 */
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SUCCESS 0
#define INVALID 1
#define NOT_READY 600
#define POISON 0xA5
#define NAMES_MAX 16

typedef struct CUevent_st {
    uint64_t asked; /* marks set */
    uint64_t come;  /* of these, reached by their stream */
    int users;      /* the owner, and operations in streams */
    int device;     /* that was current when it was made */
} * event;

enum kind { COPY, RECORD, WAIT, END };

struct operation {
    enum kind kind;
    void *target;
    const void *source;
    size_t size;
    event event;
    uint64_t number; /* of the event's marks */
    struct operation *next;
};

typedef struct CUstream_st {
    int device;
    struct operation *first, **last;
    pthread_t thread;
} * stream;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t change = PTHREAD_COND_INITIALIZER;
static struct CUstream_st default_stream;
static bool default_runs;
static _Thread_local int current_device;
static _Thread_local unsigned last_error;
static int live;

static struct {
    const char *name;
    uint64_t count;
} calls[NAMES_MAX];
static uint64_t calls_count;
static bool is_read;
static char fail_name[64];
static char fail_all_name[64];
static uint64_t fail_at;
static long delay_us;

/* --- faults --- */

static void read_environment(void) {
    const char *text = getenv("STX_FAKE_DELAY_US");
    delay_us = text == NULL ? 0 : strtol(text, NULL, 10);
    text = getenv("STX_FAKE_FAIL_ALL");
    (void)snprintf(fail_all_name, sizeof fail_all_name, "%s", text == NULL ? "" : text);
    text = getenv("STX_FAKE_FAIL");
    (void)snprintf(fail_name, sizeof fail_name, "%s", text == NULL ? "" : text);
    char *const colon = strchr(fail_name, ':');
    fail_at = colon == NULL ? 0 : strtoull(colon + 1, NULL, 10);
    if (colon != NULL) *colon = '\0';
    is_read = true;
}

/* Count a call; whether it is to fail. Under the lock. */
static bool count_call(const char *name) {
    size_t i = 0;
    if (!is_read) read_environment();
    while (calls[i].name != NULL && strcmp(calls[i].name, name) != 0) i++;
    calls[i].name = name;
    calls[i].count++;
    calls_count++;
    if (strcmp(fail_all_name, name) == 0) return true;
    if (strcmp(fail_name, "any") == 0) return calls_count == fail_at;
    return strcmp(fail_name, name) == 0 && calls[i].count == fail_at;
}

#define BEGIN()                            \
    (void)pthread_mutex_lock(&lock);       \
    if (count_call(__func__)) {            \
        (void)pthread_mutex_unlock(&lock); \
        return last_error = INVALID;       \
    }
/* What gives back does so even where it reports a failure, as the real one may. */
#define BEGIN_GIVING_BACK()          \
    (void)pthread_mutex_lock(&lock); \
    const unsigned failure = count_call(__func__) ? INVALID : SUCCESS
#define END_WITH(status)                            \
    do {                                            \
        const unsigned answer = status;             \
        (void)pthread_mutex_unlock(&lock);          \
        if (answer != SUCCESS) last_error = answer; \
        return answer;                              \
    } while (0)

/* --- for tests --- */

int fake_cudart_live(void) {
    (void)pthread_mutex_lock(&lock);
    const int count = live;
    (void)pthread_mutex_unlock(&lock);
    return count;
}

uint64_t fake_cudart_calls(const char *name) {
    uint64_t count = 0;
    (void)pthread_mutex_lock(&lock);
    if (strcmp(name, "any") == 0) count = calls_count;
    for (size_t i = 0; i < NAMES_MAX && calls[i].name != NULL; i++)
        if (strcmp(calls[i].name, name) == 0) count = calls[i].count;
    (void)pthread_mutex_unlock(&lock);
    return count;
}

void fake_cudart_reset(void) {
    (void)pthread_mutex_lock(&lock);
    memset(calls, 0, sizeof calls);
    calls_count = 0;
    is_read = false;
    (void)pthread_mutex_unlock(&lock);
}

/* --- streams --- */

static void release_event(event used) {
    if (--used->users == 0) free(used);
}

static void do_copy(const struct operation *operation) {
    memset(operation->target, POISON, operation->size);
    if (delay_us != 0) {
        const struct timespec delay = {delay_us / 1000000, delay_us % 1000000 * 1000};
        (void)nanosleep(&delay, NULL);
    }
    memcpy(operation->target, operation->source, operation->size);
}

static void *run_stream(void *argument) {
    stream const self = argument;
    (void)pthread_mutex_lock(&lock);
    for (;;) {
        while (self->first == NULL) (void)pthread_cond_wait(&change, &lock);
        struct operation *const operation = self->first;
        const enum kind kind = operation->kind;
        if (kind == COPY) {
            (void)pthread_mutex_unlock(&lock);
            do_copy(operation);
            (void)pthread_mutex_lock(&lock);
        }
        if (kind == WAIT)
            while (operation->event->come < operation->number)
                (void)pthread_cond_wait(&change, &lock);
        if (kind == RECORD) {
            operation->event->come = operation->number;
            (void)pthread_cond_broadcast(&change);
        }
        if (operation->event != NULL) release_event(operation->event);
        self->first = operation->next;
        if (self->first == NULL) self->last = &self->first;
        free(operation);
        if (kind == END) break;
    }
    (void)pthread_mutex_unlock(&lock);
    return NULL;
}

static void start_stream(stream self) {
    self->first = NULL;
    self->last = &self->first;
    if (pthread_create(&self->thread, NULL, run_stream, self) != 0) abort();
}

static stream real_stream(stream given) {
    if (given != NULL) return given;
    if (!default_runs) start_stream(&default_stream);
    default_runs = true;
    return &default_stream;
}

static void give(stream to, struct operation what) {
    struct operation *const operation = malloc(sizeof *operation);
    if (operation == NULL) abort();
    *operation = what;
    operation->next = NULL;
    if (operation->event != NULL) operation->event->users++;
    *to->last = operation;
    to->last = &operation->next;
    (void)pthread_cond_broadcast(&change);
}

/* --- the runtime --- */

const char *cudaGetErrorString(unsigned status) {
    return status == INVALID ? "invalid argument (injected)" : "unknown error";
}

/* The last failure of this thread, once. */
unsigned cudaGetLastError(void) {
    const unsigned kept = last_error;
    last_error = SUCCESS;
    return kept;
}

unsigned cudaGetDevice(int *device) {
    BEGIN();
    *device = current_device;
    END_WITH(SUCCESS);
}

unsigned cudaSetDevice(int device) {
    BEGIN();
    current_device = device;
    END_WITH(SUCCESS);
}

unsigned cudaHostRegister(void *memory, size_t size, unsigned flags) {
    BEGIN();
    (void)memory, (void)size, (void)flags;
    live++;
    END_WITH(SUCCESS);
}

unsigned cudaHostUnregister(void *memory) {
    BEGIN_GIVING_BACK();
    (void)memory;
    live--;
    END_WITH(failure);
}

unsigned cudaStreamCreateWithFlags(stream *made, unsigned flags) {
    BEGIN();
    (void)flags;
    *made = calloc(1, sizeof **made);
    if (*made == NULL) abort();
    (*made)->device = current_device;
    start_stream(*made);
    live++;
    END_WITH(SUCCESS);
}

unsigned cudaStreamDestroy(stream old) {
    BEGIN_GIVING_BACK();
    give(old, (struct operation){.kind = END});
    live--;
    (void)pthread_mutex_unlock(&lock);
    (void)pthread_join(old->thread, NULL);
    free(old);
    if (failure != SUCCESS) last_error = failure;
    return failure;
}

unsigned cudaStreamWaitEvent(stream waiting, event awaited, unsigned flags) {
    BEGIN();
    (void)flags;
    give(real_stream(waiting),
         (struct operation){.kind = WAIT, .event = awaited, .number = awaited->asked});
    END_WITH(SUCCESS);
}

unsigned cudaMemcpyAsync(void *target, const void *source, size_t size, unsigned kind, stream on) {
    BEGIN();
    (void)kind;
    give(real_stream(on),
         (struct operation){.kind = COPY, .target = target, .source = source, .size = size});
    END_WITH(SUCCESS);
}

unsigned cudaEventCreateWithFlags(event *made, unsigned flags) {
    BEGIN();
    (void)flags;
    *made = calloc(1, sizeof **made);
    if (*made == NULL) abort();
    (*made)->users = 1;
    (*made)->device = current_device;
    live++;
    END_WITH(SUCCESS);
}

unsigned cudaEventRecord(event set, stream on) {
    BEGIN();
    if (set->device != (on == NULL ? current_device : on->device)) END_WITH(INVALID);
    set->asked++;
    give(real_stream(on), (struct operation){.kind = RECORD, .event = set, .number = set->asked});
    END_WITH(SUCCESS);
}

unsigned cudaEventQuery(event asked) {
    BEGIN();
    const bool has_come = asked->come >= asked->asked;
    END_WITH(has_come ? SUCCESS : NOT_READY);
}

unsigned cudaEventSynchronize(event awaited) {
    BEGIN();
    while (awaited->come < awaited->asked) (void)pthread_cond_wait(&change, &lock);
    END_WITH(SUCCESS);
}

unsigned cudaEventDestroy(event old) {
    BEGIN_GIVING_BACK();
    live--;
    release_event(old);
    END_WITH(failure);
}
