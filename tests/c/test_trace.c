/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: the flight recorder hands out whole records and the newest of them, counts what is
 * lost, costs nothing while it is off, and may be stopped while others record; a child has its own.
 */
#include <pthread.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "trace.h"

#define THREADS 4
#define ROUNDS 60000        /* of each: together more than the ring */
#define HASTY_ROUNDS 400000 /* in a ring so small that everybody is overtaken */

static atomic_bool is_over;

/* A record whose parts belong together. */
static void record(uint64_t value, uint32_t label) {
    STX_TRACE(STX_TRACE_READ, value, label, "text", value, value + 1, value + 2, value + 3,
              value + 4, value + 5);
}

static void check_whole(const struct stx_trace_record *found) {
    const uint64_t value = found->begin_ns;
    CHECK(found->kind == STX_TRACE_READ && strcmp(found->text, "text") == 0);
    for (uint64_t i = 0; i < STX_TRACE_NUMBERS; i++) CHECK(found->numbers[i] == value + i);
    CHECK(found->thread != 0 && found->words == 0);
}

static void nothing_is_recorded_while_it_is_off(void) {
    struct stx_trace_record found;
    CHECK(!stx_trace_is_on() && stx_trace_begin() == 0 && stx_trace_label("x") == 0);
    record(7, 0);
    stx_trace_fallback("x");
    CHECK(stx_trace_count() == 0 && !stx_trace_get(0, &found));
    stx_trace_stop();
    CHECK(atomic_load(&stx_trace_gate) == 0);
}

static void a_record_comes_back(void) {
    struct stx_trace_record found;
    CHECK(stx_trace_start(STX_TRACE_RECORDS) && stx_trace_start(STX_TRACE_RECORDS) &&
          stx_trace_is_on());
    const uint32_t label = stx_trace_label("/a/file");
    const uint64_t begin_ns = stx_trace_begin();
    CHECK(begin_ns != 0 && stx_trace_label("/a/file") == label);
    STX_TRACE(STX_TRACE_OPEN, begin_ns, label, "parsed", 5);
    STX_TRACE(STX_TRACE_OPEN, 0, label, "not begun", 5);
    CHECK(stx_trace_count() == 1 && stx_trace_get(0, &found) && !stx_trace_get(1, &found));
    CHECK(found.kind == STX_TRACE_OPEN && found.begin_ns == begin_ns && found.end_ns >= begin_ns);
    CHECK(found.numbers[0] == 5 && found.numbers[1] == 0 && strcmp(found.text, "parsed") == 0);
    CHECK(found.thread == (uint32_t)syscall(SYS_gettid));
    CHECK(strcmp(stx_trace_label_text(found.label), "/a/file") == 0);
    CHECK(stx_trace_label_text(0) == NULL && stx_trace_label_text(label + 1) == NULL);
    stx_trace_stop();
    CHECK(!stx_trace_is_on() && stx_trace_label_text(label) == NULL);
    CHECK(!stx_trace_get(0, &found));
    CHECK(stx_trace_start(STX_TRACE_RECORDS) && stx_trace_count() == 0 &&
          !stx_trace_get(0, &found));
    CHECK(stx_trace_label_text(label) == NULL); /* of an earlier recording */
    CHECK(stx_trace_label("/another") != label);
    stx_trace_stop();
}

static void moments_have_words(void) {
    struct stx_err err;
    struct stx_trace_record found;
    CHECK(stx_trace_start(STX_TRACE_RECORDS));
    stx_trace_fallback("framework np");
    stx_trace_error(stx_trace_label("/a/file"), 77,
                    (stx_err_set_errno(&err, 5, "pread") == STX_ERR_IO ? &err : NULL));
    CHECK(stx_trace_get(0, &found) && found.kind == STX_TRACE_FALLBACK);
    CHECK(found.begin_ns == found.end_ns && found.label == 0);
    CHECK(strcmp(stx_trace_label_text(found.words), "framework np") == 0);
    CHECK(stx_trace_get(1, &found) && found.kind == STX_TRACE_ERROR);
    CHECK(found.numbers[0] == 77 && found.numbers[1] == 5 && strcmp(found.text, "io") == 0);
    CHECK(strcmp(stx_trace_label_text(found.label), "/a/file") == 0);
    CHECK(strncmp(stx_trace_label_text(found.words), "pread: ", 7) == 0);
    stx_trace_stop();
}

static void the_newest_stay(void) {
    struct stx_trace_record found;
    const uint64_t count = 2 * STX_TRACE_RECORDS + 100;
    CHECK(stx_trace_start(STX_TRACE_RECORDS));
    for (uint64_t i = 0; i < count; i++) record(i + 1, 0);
    CHECK(stx_trace_count() == count);
    for (uint64_t i = 0; i < count; i++) {
        const bool is_there = stx_trace_get(i, &found);
        CHECK(is_there == (i >= count - STX_TRACE_RECORDS));
        if (!is_there) continue;
        check_whole(&found);
        CHECK(found.begin_ns == i + 1);
    }
    stx_trace_stop();
}

static void texts_are_bounded(void) {
    char text[STX_TRACE_TEXT_BYTES + 100], name[32];
    CHECK(stx_trace_start(STX_TRACE_RECORDS));
    memset(text, 'x', sizeof text);
    text[sizeof text - 1] = '\0';
    const uint32_t label = stx_trace_label(text);
    CHECK(strlen(stx_trace_label_text(label)) == STX_TRACE_TEXT_BYTES);
    text[sizeof text - 2] = 'y'; /* beyond what is kept */
    CHECK(stx_trace_label(text) == label);
    for (int i = 1; i < STX_TRACE_TEXTS; i++) {
        (void)snprintf(name, sizeof name, "file %d", i);
        const uint32_t found = stx_trace_label(name);
        CHECK(found != 0 && strcmp(stx_trace_label_text(found), name) == 0);
    }
    CHECK(stx_trace_label("one too many") == 0);
    CHECK(stx_trace_label("file 1") != 0 && stx_trace_label(text) == label);
    stx_trace_stop();
}

static void *record_many(void *argument) {
    const uint64_t first = (uint64_t)(uintptr_t)argument * ROUNDS + 1;
    for (uint64_t i = 0; i < ROUNDS; i++) record(first + i, 0);
    return NULL;
}

static void *record_hastily(void *argument) {
    const uint64_t first = (uint64_t)(uintptr_t)argument * HASTY_ROUNDS + 1;
    for (uint64_t i = 0; i < HASTY_ROUNDS; i++) record(first + i, 0);
    return NULL;
}

static void *record_on(void *unused) {
    (void)unused;
    for (uint64_t i = 1; !atomic_load(&is_over); i++) {
        record(i, stx_trace_label("/a/file"));
        stx_trace_fallback("reason");
    }
    return NULL;
}

static void start_threads(pthread_t threads[THREADS], void *(*function)(void *argument)) {
    for (uintptr_t i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, function, (void *)i) == 0);
}

static void join_threads(const pthread_t threads[THREADS]) {
    for (int i = 0; i < THREADS; i++) CHECK(pthread_join(threads[i], NULL) == 0);
}

/* How many of the ring can be read, each of them whole. */
static uint64_t count_readable(void) {
    struct stx_trace_record found;
    const uint64_t count = stx_trace_count();
    uint64_t readable = 0;
    for (uint64_t i = count < STX_TRACE_RECORDS ? 0 : count - STX_TRACE_RECORDS; i < count; i++) {
        if (!stx_trace_get(i, &found)) continue;
        readable++;
        if (found.kind == STX_TRACE_READ) check_whole(&found);
    }
    return readable;
}

/* Every record has a number; only those that met another in their slot can be missing. */
static void threads_record_side_by_side(void) {
    pthread_t threads[THREADS];
    CHECK(stx_trace_start(STX_TRACE_RECORDS));
    start_threads(threads, record_many);
    join_threads(threads);
    CHECK(stx_trace_count() == THREADS * ROUNDS);
    const uint64_t readable = count_readable();
    CHECK(readable <= STX_TRACE_RECORDS && readable >= STX_TRACE_RECORDS - THREADS);
    stx_trace_stop();
}

/* By others who write, or while it is read. */
static void nothing_is_torn(void) {
    struct stx_trace_record found;
    pthread_t threads[THREADS];
    uint64_t count = 0;
    CHECK(stx_trace_start(2));
    start_threads(threads, record_hastily);
    while (count != THREADS * HASTY_ROUNDS) {
        count = stx_trace_count();
        for (uint64_t i = count < 2 ? 0 : count - 2; i < count; i++)
            if (stx_trace_get(i, &found)) check_whole(&found);
    }
    join_threads(threads);
    for (uint64_t i = count - 2; i < count; i++)
        if (stx_trace_get(i, &found)) check_whole(&found);
    stx_trace_stop();
}

static void it_is_stopped_while_threads_record(void) {
    pthread_t threads[THREADS];
    atomic_store(&is_over, false);
    start_threads(threads, record_on);
    for (int i = 0; i < 50; i++) {
        CHECK(stx_trace_start(STX_TRACE_RECORDS));
        while (stx_trace_count() < 10) (void)usleep(10);
        (void)count_readable();
        stx_trace_stop();
    }
    atomic_store(&is_over, true);
    join_threads(threads);
    CHECK(atomic_load(&stx_trace_gate) == 0);
}

static void live_as_a_child(uint32_t label) {
    struct stx_trace_record found;
    CHECK(!stx_trace_is_on() && stx_trace_label_text(label) == NULL && !stx_trace_get(0, &found));
    record(5, label);
    CHECK(stx_trace_start(STX_TRACE_RECORDS) && stx_trace_count() == 0);
    record(7, stx_trace_label("/the/child's"));
    CHECK(stx_trace_get(0, &found) && found.thread == (uint32_t)getpid());
    CHECK(strcmp(stx_trace_label_text(found.label), "/the/child's") == 0);
    stx_trace_stop();
    CHECK(atomic_load(&stx_trace_gate) == 0);
}

static void a_child_has_its_own(void) {
    pthread_t threads[THREADS];
    CHECK(stx_trace_start(STX_TRACE_RECORDS));
    const uint32_t label = stx_trace_label("/the/parent's");
    atomic_store(&is_over, false);
    start_threads(threads, record_on);
    for (int i = 0; i < 5; i++) {
        int status = -1;
        (void)usleep(5000); /* sanitizers do not like threads that are just being made */
        const pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            live_as_a_child(label);
            _exit(0);
        }
        CHECK(waitpid(child, &status, 0) == child && status == 0);
    }
    atomic_store(&is_over, true);
    join_threads(threads);
    CHECK(strcmp(stx_trace_label_text(label), "/the/parent's") == 0 && count_readable() != 0);
    stx_trace_stop();
}

static void every_kind_has_a_name(void) {
    for (int i = 0; i < STX_TRACE_KINDS; i++) {
        const struct stx_trace_info *info = stx_trace_info((enum stx_trace_kind)i);
        CHECK(info->name != NULL && info->name[0] != '\0');
        for (int j = 0; j < i; j++)
            CHECK(strcmp(stx_trace_info((enum stx_trace_kind)j)->name, info->name) != 0);
    }
}

int main(void) {
    nothing_is_recorded_while_it_is_off();
    a_record_comes_back();
    moments_have_words();
    the_newest_stay();
    texts_are_bounded();
    threads_record_side_by_side();
    nothing_is_torn();
    it_is_stopped_while_threads_record();
    a_child_has_its_own();
    every_kind_has_a_name();
    return 0;
}
