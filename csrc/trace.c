/* SPDX-License-Identifier: Apache-2.0
 *
 * DESIGN. A record is a number, drawn from one counter, and a slot, which follows from it. A slot's
 * sequence is odd while it is written and tells whose record it holds otherwise. Whoever finds the
 * slot being written, or already younger, has been overtaken by a whole ring: that record is lost,
 * which is all that waiting could have saved. Words are stored with release and loaded with
 * acquire, so that a reader who saw one word of a younger record sees its sequence, too.
 *
 * The memory goes when the gate's bit is off and its count is zero: a thread counts itself in with
 * the same operation that tells it whether the bit is on.
 */
#include "trace.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define GATE_ON 1u
#define GATE_ONE 2u
#define WORDS (sizeof(struct stx_trace_record) / sizeof(uint64_t))
/* A power of two, with room to spare; a label is such a place and the recording's number. */
#define PLACES (2 * STX_TRACE_TEXTS)
#define PLACE_BITS 12
_Static_assert(PLACES < (1 << PLACE_BITS), "a label holds a place, from one on");

struct slot {
    _Atomic uint64_t sequence; /* 0: empty, 2n + 1: n is being written, 2n + 2: n is here */
    _Atomic uint64_t words[WORDS];
};
_Static_assert(sizeof(struct slot) <= 96, "what the header promises");
_Static_assert(sizeof(struct stx_trace_record) % sizeof(uint64_t) == 0, "whole words");

atomic_uint stx_trace_gate;

static struct slot *slots;
static uint32_t slots_count;
static _Atomic uint64_t next_number;
static _Thread_local uint32_t thread_number;

/* Texts, by their hash. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards what follows */
static char *texts[PLACES];
static uint32_t texts_count;
static uint32_t recording; /* its number, from one on */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static bool is_fork_safe;

static const struct stx_trace_info infos[STX_TRACE_KINDS] = {
    [STX_TRACE_OPEN] = {.name = "open",
                        .text = "header",
                        .numbers = {"bytes_read", "requests", "file_bytes", "tensors"}},
    [STX_TRACE_FILTER] = {.name = "filter",
                          .text = "decided_by",
                          .numbers = {"kept", "skipped", "bytes_kept", "bytes_skipped"}},
    [STX_TRACE_PLAN] = {.name = "plan",
                        .numbers = {"spans", "reads", "bytes_kept", "bytes_to_read"}},
    [STX_TRACE_CACHE] = {.name = "cache",
                         .text = "state",
                         .numbers = {"bytes_asked", "bytes_sampled", "bytes_cached"}},
    [STX_TRACE_LOAD] = {.name = "load", .text = "way", .numbers = {"tensors", "bytes", "failed"}},
    [STX_TRACE_ENGINE] = {.name = "engine",
                          .text = "engine",
                          .numbers = {"bytes", "requests", "retries", "direct", "cancelled",
                                      "failed"}},
    [STX_TRACE_READ] = {.name = "read",
                        .shape = STX_TRACE_BESIDE,
                        .text = "engine",
                        .numbers = {"offset", "bytes_asked", "bytes_read", "retry", "direct",
                                    "errno"}},
    [STX_TRACE_READ_AHEAD] = {.name = "read ahead",
                              .text = "problem",
                              .numbers = {"offset", "ranges", "bytes_read"}},
    [STX_TRACE_COPY] = {.name = "copy", .text = "device", .numbers = {"offset", "reads", "bytes"}},
    [STX_TRACE_DEVICE_COPY] = {.name = "device copy",
                               .shape = STX_TRACE_BESIDE,
                               .text = "device",
                               .numbers = {"slot", "bytes"}},
    [STX_TRACE_WAIT] = {.name = "wait", .text = "for"},
    [STX_TRACE_TENSORS] = {.name = "tensors", .numbers = {"tensors", "failed"}},
    [STX_TRACE_FALLBACK] = {.name = "to stock", .shape = STX_TRACE_MOMENT, .words = "reason"},
    [STX_TRACE_ERROR] = {.name = "error",
                         .shape = STX_TRACE_MOMENT,
                         .text = "kind",
                         .words = "message",
                         .numbers = {"offset", "errno"}},
};

const struct stx_trace_info *stx_trace_info(enum stx_trace_kind kind) { return &infos[kind]; }

uint64_t stx_trace_now_ns(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* --- the gate --- */

static void leave(void) {
    atomic_fetch_sub_explicit(&stx_trace_gate, GATE_ONE, memory_order_release);
}

/* Until `leave`, nothing is freed. False while nobody records: then there is nothing. */
static bool enter(void) {
    const unsigned before =
        atomic_fetch_add_explicit(&stx_trace_gate, GATE_ONE, memory_order_acquire);
    if ((before & GATE_ON) != 0) return true;
    leave();
    return false;
}

/* --- records --- */

static uint32_t number_of_thread(void) {
    if (thread_number == 0) thread_number = (uint32_t)syscall(SYS_gettid);
    return thread_number;
}

static void write_record(const struct stx_trace_record *record) {
    uint64_t words[WORDS];
    const uint64_t number = atomic_fetch_add_explicit(&next_number, 1, memory_order_relaxed);
    struct slot *const slot = &slots[number % slots_count];
    uint64_t before = atomic_load_explicit(&slot->sequence, memory_order_relaxed);
    if (before % 2 == 1 || before > 2 * number ||
        !atomic_compare_exchange_strong_explicit(&slot->sequence, &before, 2 * number + 1,
                                                 memory_order_acq_rel, memory_order_relaxed))
        return;
    memcpy(words, record, sizeof words);
    for (size_t i = 0; i < WORDS; i++)
        atomic_store_explicit(&slot->words[i], words[i], memory_order_release);
    atomic_store_explicit(&slot->sequence, 2 * number + 2, memory_order_release);
}

void stx_trace_add(enum stx_trace_kind kind, uint64_t begin_ns, uint64_t end_ns, uint32_t label,
                   const char *text, const uint64_t numbers[STX_TRACE_NUMBERS]) {
    if (!enter()) return;
    struct stx_trace_record record = {.begin_ns = begin_ns,
                                      .end_ns = end_ns,
                                      .text = text,
                                      .label = label,
                                      .kind = kind,
                                      .thread = number_of_thread()};
    memcpy(record.numbers, numbers, sizeof record.numbers);
    write_record(&record);
    leave();
}

/* With `words` that are kept. */
static void add_moment(enum stx_trace_kind kind, uint32_t label, const char *text,
                       const char *words, uint64_t offset_bytes, uint64_t number) {
    const uint64_t now = stx_trace_begin();
    if (now == 0) return;
    const struct stx_trace_record record = {.begin_ns = now,
                                            .end_ns = now,
                                            .text = text,
                                            .numbers = {offset_bytes, number},
                                            .label = label,
                                            .words = stx_trace_label(words),
                                            .kind = kind,
                                            .thread = number_of_thread()};
    if (!enter()) return;
    write_record(&record);
    leave();
}

void stx_trace_fallback(const char *reason) {
    add_moment(STX_TRACE_FALLBACK, 0, NULL, reason, 0, 0);
}

void stx_trace_error(uint32_t label, uint64_t offset_bytes, const struct stx_err *err) {
    add_moment(STX_TRACE_ERROR, label, stx_err_name(err->status), err->message, offset_bytes,
               (uint64_t)err->sys_errno);
}

uint64_t stx_trace_count(void) { return atomic_load_explicit(&next_number, memory_order_relaxed); }

bool stx_trace_get(uint64_t number, struct stx_trace_record *record) {
    uint64_t words[WORDS];
    const uint64_t whole = 2 * number + 2;
    if (slots == NULL) return false;
    const struct slot *const slot = &slots[number % slots_count];
    if (atomic_load_explicit(&slot->sequence, memory_order_acquire) != whole) return false;
    for (size_t i = 0; i < WORDS; i++)
        words[i] = atomic_load_explicit(&slot->words[i], memory_order_acquire);
    if (atomic_load_explicit(&slot->sequence, memory_order_relaxed) != whole) return false;
    memcpy(record, words, sizeof words);
    return true;
}

/* --- texts --- */

/* FNV-1a, of as much as is kept. */
static uint32_t hash(const char *text) {
    uint32_t value = 2166136261u;
    for (size_t i = 0; text[i] != '\0' && i < STX_TRACE_TEXT_BYTES; i++)
        value = (value ^ (unsigned char)text[i]) * 16777619u;
    return value;
}

/* The place of a text, which is put there if it is new; PLACES without room. With the lock held. */
static uint32_t find_place(const char *text) {
    uint32_t place = hash(text) % PLACES;
    while (texts[place] != NULL && strncmp(texts[place], text, STX_TRACE_TEXT_BYTES) != 0)
        place = (place + 1) % PLACES;
    if (texts[place] != NULL) return place;
    if (texts_count == STX_TRACE_TEXTS) return PLACES;
    texts[place] = strndup(text, STX_TRACE_TEXT_BYTES);
    if (texts[place] == NULL) return PLACES;
    texts_count++;
    return place;
}

uint32_t stx_trace_label(const char *text) {
    uint32_t label = 0;
    if (!stx_trace_is_on() || !enter()) return 0;
    (void)pthread_mutex_lock(&lock);
    const uint32_t place = find_place(text);
    if (place != PLACES) label = recording << PLACE_BITS | (place + 1);
    (void)pthread_mutex_unlock(&lock);
    leave();
    return label;
}

const char *stx_trace_label_text(uint32_t label) {
    const uint32_t place = label & ((1u << PLACE_BITS) - 1);
    const char *text = NULL;
    (void)pthread_mutex_lock(&lock);
    if (place != 0 && place <= PLACES && label == (recording << PLACE_BITS | place))
        text = texts[place - 1];
    (void)pthread_mutex_unlock(&lock);
    return text;
}

/* --- beginning and end --- */

/* With the lock held, and nobody about it. */
static void release(void) {
    for (uint32_t i = 0; i < PLACES; i++) {
        free(texts[i]);
        texts[i] = NULL;
    }
    texts_count = 0;
    free(slots);
    slots = NULL;
}

static void before_fork(void) { (void)pthread_mutex_lock(&lock); }

static void after_fork_in_parent(void) { (void)pthread_mutex_unlock(&lock); }

/* Whoever was recording in the parent is not here, but is still in the count. */
static void after_fork_in_child(void) {
    atomic_store_explicit(&stx_trace_gate, 0, memory_order_relaxed);
    thread_number = 0;
    release();
    (void)pthread_mutex_unlock(&lock);
}

static void prepare(void) {
    is_fork_safe = pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child) == 0;
}

bool stx_trace_start(uint32_t records_count) {
    (void)pthread_once(&once, prepare);
    if (stx_trace_is_on()) return true;
    struct slot *const made = is_fork_safe ? calloc(records_count, sizeof *made) : NULL;
    if (made == NULL) return false;
    (void)pthread_mutex_lock(&lock);
    recording++;
    slots = made;
    slots_count = records_count;
    (void)pthread_mutex_unlock(&lock);
    atomic_store_explicit(&next_number, 0, memory_order_relaxed);
    atomic_fetch_or_explicit(&stx_trace_gate, GATE_ON, memory_order_release);
    return true;
}

void stx_trace_stop(void) {
    if (!stx_trace_is_on()) return;
    atomic_fetch_and_explicit(&stx_trace_gate, ~GATE_ON, memory_order_acq_rel);
    while (atomic_load_explicit(&stx_trace_gate, memory_order_acquire) != 0) (void)sched_yield();
    (void)pthread_mutex_lock(&lock);
    release();
    (void)pthread_mutex_unlock(&lock);
}
