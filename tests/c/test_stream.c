/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: a stream hands out every kept tensor once, whole and in order, holds no more than
 * its window, and ends wherever its consumer or its file does, leaving nothing behind.
 */
#include "stream.h"

#include <pthread.h>
#include <time.h>

#include "checked.h"
#include "scratch.h"

#define KIB (UINT64_C(1) << 10)
#define MIB (UINT64_C(1) << 20)
#define TENSORS_MAX 400
#define PIECES_MAX (TENSORS_MAX + 1)
#define DATA_BEGIN 1003
#define OVERWRITTEN 0x5A

#ifdef __SANITIZE_THREAD__
#define IS_TSAN true
#else
#define IS_TSAN false
#endif

static struct stx_err err;
static struct scratch scratch;
static struct stx_tensor tensors[TENSORS_MAX];
static uint8_t keep[TENSORS_MAX];
static struct stx_header header;

/* Tensors of random sizes over the whole file; `most_bytes` each, some empty, two large. */
static void make_tensors(uint64_t most_bytes, uint64_t seed) {
    uint64_t at = 0;
    const uint64_t data_bytes = scratch.size_bytes - DATA_BEGIN;
    header = (struct stx_header){
        .tensors = tensors, .data_begin_bytes = DATA_BEGIN, .file_size_bytes = scratch.size_bytes};
    while (header.tensors_count < TENSORS_MAX - 1 && at != data_bytes) {
        uint64_t size_bytes = 1 + random_below(&seed, most_bytes);
        if (random_below(&seed, 5) == 0) size_bytes = 0;
        if (random_below(&seed, 40) == 0) size_bytes = 6 * most_bytes;
        if (header.tensors_count == TENSORS_MAX - 2 || size_bytes > data_bytes - at)
            size_bytes = data_bytes - at;
        tensors[header.tensors_count] = (struct stx_tensor){.begin = at, .end = at + size_bytes};
        keep[header.tensors_count++] = random_below(&seed, 3) != 0;
        at += size_bytes;
    }
    tensors[header.tensors_count++] = (struct stx_tensor){.begin = at, .end = at};
    CHECK(at == data_bytes);
}

static const struct stx_owned_options ways[] = {
    {STX_ENGINE_AUTO, STX_DIRECT_AUTO, 0},          {STX_ENGINE_THREADS, STX_DIRECT_OFF, 0},
    {STX_ENGINE_THREADS, STX_DIRECT_ON, 20 * 1024}, {STX_ENGINE_URING, STX_DIRECT_ON, 0},
    {STX_ENGINE_URING, STX_DIRECT_OFF, 1},
};
#define WAYS_COUNT (sizeof ways / sizeof ways[0])

static struct stx_stream *open_stream(const uint8_t *kept, uint32_t first, size_t way,
                                      uint64_t window_bytes) {
    struct stx_file file;
    struct stx_stream *stream = NULL;
    CHECK(stx_file_open(&file, scratch.path, &err) == STX_OK);
    CHECK(stx_stream_open(&stream, &file, &header, kept, first, &ways[way], window_bytes, &err) ==
          STX_OK);
    CHECK(file.fd == -1 && stx_stream_file(stream)->fd >= 0);
    return stream;
}

static void sleep_ms(long ms) {
    (void)nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000}, NULL);
}

/* --- a consumer --- */

struct consumer {
    struct stx_stream *stream;
    const uint8_t *keep;
    struct stx_arena *arenas[PIECES_MAX]; /* pieces it has not dropped */
    size_t arenas_count;
    uint32_t next;          /* tensor that comes next */
    uint64_t given_bytes;   /* memory of all pieces taken, */
    uint64_t largest_bytes; /* of the largest, */
    uint64_t held_bytes;    /* of the last */
    bool is_over;
};

static struct consumer begin(struct stx_stream *stream, const uint8_t *kept, uint32_t first) {
    return (struct consumer){.stream = stream, .keep = kept, .next = first};
}

/* Every kept tensor of the piece lies in it, whole, and apart from the others. */
static void check_piece(const struct consumer *consumer, const struct stx_stream_piece *piece) {
    const char *const bytes = stx_arena_bytes(piece->arena);
    uint64_t behind = 0;
    for (uint32_t i = piece->tensor_first; i < piece->tensor_first + piece->tensors_count; i++) {
        const uint64_t begin_bytes = DATA_BEGIN + tensors[i].begin;
        const uint64_t size_bytes = tensors[i].end - tensors[i].begin;
        if (size_bytes == 0 || (consumer->keep != NULL && !consumer->keep[i])) continue;
        const uint64_t place = stx_plan_place(piece->reads, piece->reads_count, begin_bytes);
        CHECK(place >= behind && place + size_bytes <= stx_arena_size_bytes(piece->arena));
        CHECK(memcmp(bytes + place, scratch.bytes + begin_bytes, size_bytes) == 0);
        behind = place + size_bytes;
    }
}

static enum stx_status step_within(struct consumer *consumer, uint32_t timeout_ms, bool *ready) {
    struct stx_stream_piece piece = {.arena = NULL};
    uint64_t failed_offset_bytes = 0;
    const enum stx_status status =
        stx_stream_next(consumer->stream, timeout_ms, &piece, ready, &failed_offset_bytes, &err);
    CHECK(status == STX_OK || !*ready);
    if (!*ready) return status;
    consumer->is_over = piece.tensors_count == 0;
    if (consumer->is_over) {
        CHECK(piece.arena == NULL && consumer->next == header.tensors_count);
        return status;
    }
    CHECK(piece.arena != NULL && piece.tensor_first == consumer->next);
    CHECK(piece.tensor_first + piece.tensors_count <= header.tensors_count);
    check_piece(consumer, &piece);
    consumer->next += piece.tensors_count;
    consumer->held_bytes = stx_arena_size_bytes(piece.arena);
    consumer->given_bytes += consumer->held_bytes;
    consumer->largest_bytes = stx_max_u64(consumer->largest_bytes, consumer->held_bytes);
    memset(stx_arena_bytes(piece.arena), OVERWRITTEN, consumer->held_bytes);
    consumer->arenas[consumer->arenas_count++] = piece.arena;
    return status;
}

/* The next piece, whenever it comes. */
static enum stx_status step(struct consumer *consumer) {
    enum stx_status status = STX_OK;
    for (bool ready = false; !ready && status == STX_OK;)
        status = step_within(consumer, 1000, &ready);
    return status;
}

/* Nobody has written into a piece since it was handed out. */
static void drop(struct consumer *consumer) {
    for (; consumer->arenas_count != 0; consumer->arenas_count--) {
        struct stx_arena *const arena = consumer->arenas[consumer->arenas_count - 1];
        for (uint64_t at = 0; at < stx_arena_size_bytes(arena); at++)
            CHECK(stx_arena_bytes(arena)[at] == OVERWRITTEN);
        stx_arena_release(arena);
    }
}

struct held {
    int descriptors, threads;
};

static struct held count_held(void) {
    return (struct held){count_entries("/proc/self/fd"), count_entries("/proc/self/task")};
}

/* A joined thread may be listed for a moment. */
static void check_held(struct held before) {
    for (int i = 0; i < 1000 && count_held().threads != before.threads; i++) sleep_ms(1);
    const struct held now = count_held();
    CHECK(now.descriptors == before.descriptors && now.threads == before.threads);
}

/* --- from the first to the last --- */

static uint64_t sum_kept(const uint8_t *kept, uint32_t first) {
    uint64_t sum = 0;
    for (size_t i = first; i < header.tensors_count; i++)
        if (kept == NULL || kept[i]) sum += tensors[i].end - tensors[i].begin;
    return sum;
}

static void run_whole(const uint8_t *kept, uint32_t first, size_t way, uint64_t window_bytes,
                      bool drops) {
    struct consumer consumer = begin(open_stream(kept, first, way, window_bytes), kept, first);
    while (!consumer.is_over) {
        CHECK(step(&consumer) == STX_OK);
        if (drops) drop(&consumer);
    }
    CHECK(step(&consumer) == STX_OK && consumer.is_over); /* and again */
    struct stx_owned_way done;
    uint64_t wanted_bytes = 0;
    stx_stream_stop(consumer.stream);
    const struct stx_load_result result = stx_stream_result(consumer.stream, &wanted_bytes, &done);
    CHECK(wanted_bytes == sum_kept(kept, first));
    CHECK(result.engine != NULL && result.bytes_read >= sum_kept(kept, first));
    CHECK(!result.direct || done.why_buffered == NULL);
    if (ways[way].direct_io == STX_DIRECT_OFF)
        CHECK(strcmp(done.why_buffered, "direct_io is off") == 0 && !result.direct);
    CHECK(consumer.largest_bytes <=
          stx_max_u64(window_bytes / 8, consumer.largest_bytes) + 3 * 4096);
    stx_stream_close(consumer.stream);
    drop(&consumer);
}

static void test_all_ways(void) {
    const uint64_t windows[] = {0, 1, 64 * KIB, 500000, 64 * MIB};
    const struct held before = count_held();
    for (size_t way = 0; way < WAYS_COUNT; way++)
        for (size_t i = 0; i < sizeof windows / sizeof windows[0]; i++) {
            make_tensors(i % 2 == 0 ? 20000 : 3000, i + 1);
            run_whole(NULL, 0, way, windows[i], true);
            run_whole(keep, 0, way, windows[i], i % 2 == 0);
            run_whole(keep, (uint32_t)header.tensors_count / 2, way, windows[i], false);
        }
    check_held(before);
}

static void test_beginnings(void) {
    make_tensors(20000, 5);
    for (uint32_t first = 0; first <= header.tensors_count; first += 7)
        run_whole(first % 2 == 0 ? keep : NULL, first, 0, 100000, true);
    run_whole(keep, (uint32_t)header.tensors_count, 0, 100000, true);
    run_whole(keep, (uint32_t)header.tensors_count - 1, 0, 100000, true);
}

static void test_nothing_to_read(void) {
    static const uint8_t none[TENSORS_MAX] = {0};
    static uint8_t empty[TENSORS_MAX];
    const struct held before = count_held();
    for (size_t way = 0; way < WAYS_COUNT; way++) {
        make_tensors(20000, 3);
        run_whole(none, 0, way, 100000, true);
        for (size_t i = 0; i < header.tensors_count; i++)
            empty[i] = tensors[i].begin == tensors[i].end;
        run_whole(empty, 0, way, 100000, true);
        header.tensors_count = 0;
        run_whole(NULL, 0, way, 0, true);
        run_whole(keep, 0, way, 100000, true);
    }
    check_held(before);
}

/* --- the window --- */

/* What this process has read by read() and its kin. */
static uint64_t read_so_far(void) {
    unsigned long long bytes = 0;
    FILE *const file = fopen("/proc/self/io", "r");
    CHECK(file != NULL && fscanf(file, "rchar: %llu", &bytes) == 1 && fclose(file) == 0);
    return bytes;
}

/* A consumer that stops after each piece: nothing more than the window is read ahead of it, what
 * it keeps does not count, and the window is used. */
static void test_window(uint64_t window_bytes, uint64_t most_bytes) {
    make_tensors(most_bytes, 21);
    uint64_t largest_bytes = 0;
    for (size_t i = 0; i < header.tensors_count; i++)
        largest_bytes = stx_max_u64(largest_bytes, tensors[i].end - tensors[i].begin);
    const uint64_t limit_bytes = stx_max_u64(window_bytes, largest_bytes + 2 * 4096);
    const uint64_t before_bytes = read_so_far();
    struct consumer consumer = begin(open_stream(NULL, 0, 1, window_bytes), NULL, 0);
    uint64_t ahead_bytes = 0, most_ahead_bytes = 0;
    while (!consumer.is_over) {
        sleep_ms(consumer.arenas_count < 8 ? 60 : 2);
        /* The last piece counts until the next one is asked for. */
        ahead_bytes = read_so_far() - before_bytes;
        CHECK(ahead_bytes <= consumer.given_bytes - consumer.held_bytes + limit_bytes + 16 * KIB);
        most_ahead_bytes = stx_max_u64(most_ahead_bytes, ahead_bytes - consumer.given_bytes);
        CHECK(step(&consumer) == STX_OK);
    }
    CHECK(most_ahead_bytes >= window_bytes / 2 && most_ahead_bytes < scratch.size_bytes);
    stx_stream_close(consumer.stream);
    drop(&consumer);
}

/* A consumer that asks before anything can be there is told so, not kept. */
static void test_impatience(void) {
    make_tensors(20000, 8);
    struct consumer consumer = begin(open_stream(keep, 0, 0, 100000), keep, 0);
    uint64_t asked = 0;
    for (; !consumer.is_over; asked++) {
        bool ready = false;
        CHECK(step_within(&consumer, 0, &ready) == STX_OK);
        CHECK(asked < 100000000);
    }
    stx_stream_close(consumer.stream);
    drop(&consumer);
}

/* --- ends --- */

static void test_closing(void) {
    const struct held before = count_held();
    make_tensors(20000, 13);
    for (size_t way = 0; way < WAYS_COUNT; way++)
        for (size_t taken = 0; taken < 100; taken += 1 + taken / 4) {
            struct consumer consumer = begin(open_stream(keep, 0, way, 150000), keep, 0);
            for (size_t i = 0; i < taken && !consumer.is_over; i++)
                CHECK(step(&consumer) == STX_OK);
            if (taken % 3 == 1) sleep_ms((long)(taken % 7));
            stx_stream_close(consumer.stream);
            drop(&consumer); /* what was handed out lives on */
        }
    stx_stream_close(NULL);
    stx_stream_abandon(NULL);
    check_held(before);
}

static void write_file(uint64_t size_bytes) {
    FILE *const file = fopen(scratch.path, "r+b");
    CHECK(file != NULL && fwrite(scratch.bytes, 1, size_bytes, file) == size_bytes);
    CHECK(fclose(file) == 0 && truncate(scratch.path, (off_t)size_bytes) == 0);
}

/* The file loses its end before the first read or after some pieces. */
static void test_truncation(size_t way, uint64_t left_bytes, size_t taken) {
    struct stx_file file;
    struct consumer consumer = begin(NULL, NULL, 0);
    enum stx_status status = STX_OK;
    bool ready;
    CHECK(stx_file_open(&file, scratch.path, &err) == STX_OK);
    if (taken == 0) CHECK(truncate(scratch.path, (off_t)left_bytes) == 0);
    CHECK(stx_stream_open(&consumer.stream, &file, &header, NULL, 0, &ways[way], 150000, &err) ==
          STX_OK);
    for (size_t i = 0; i < taken && !consumer.is_over && status == STX_OK; i++)
        status = step(&consumer);
    CHECK(status == STX_OK);
    if (taken != 0) CHECK(truncate(scratch.path, (off_t)left_bytes) == 0);
    while (!consumer.is_over && status == STX_OK) status = step(&consumer);
    if (taken == 0 || status != STX_OK) {
        CHECK(status == STX_ERR_IO && err.sys_errno == 0);
        CHECK(strstr(err.message, "file truncated at byte") == err.message);
        /* And so from now on. */
        CHECK(step_within(&consumer, 0, &ready) == STX_ERR_IO);
    } else { /* all had been read by then */
        CHECK(consumer.is_over);
    }
    stx_stream_close(consumer.stream);
    drop(&consumer);
    write_file(scratch.size_bytes);
}

static void test_truncations(void) {
    const struct held before = count_held();
    make_tensors(20000, 17);
    for (size_t way = 0; way < WAYS_COUNT; way++) {
        const uint64_t left[] = {0, 1, 4096, 100001, scratch.size_bytes - 1};
        for (size_t i = 0; i < sizeof left / sizeof left[0]; i++) {
            test_truncation(way, left[i], 0);
            test_truncation(way, left[i], 3);
        }
    }
    check_held(before);
}

/* --- threads and processes --- */

static void *step_once(void *consumer) {
    CHECK(step(consumer) == STX_OK);
    return NULL;
}

/* Every step on a thread of its own, also the first and the last. */
static void test_threads_in_turn(void) {
    make_tensors(20000, 19);
    struct consumer consumer = begin(open_stream(keep, 0, 0, 200000), keep, 0);
    while (!consumer.is_over) {
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, step_once, &consumer) == 0);
        CHECK(pthread_join(thread, NULL) == 0);
    }
    stx_stream_close(consumer.stream);
    drop(&consumer);
}

/* ThreadSanitizer does not see that liburing unmaps a ring, and takes another one that comes to lie
 * there for the same memory. */
static size_t way_for_tsan(size_t way) { return IS_TSAN ? 1 + way % 2 : way; }

static void *run_several(void *argument) {
    const uint8_t *const kept = argument;
    for (size_t i = 0; i < WAYS_COUNT; i++) run_whole(kept, 0, way_for_tsan(i), 100000, i % 2 == 0);
    return NULL;
}

static void test_streams_beside_each_other(void) {
    pthread_t threads[4];
    make_tensors(20000, 23);
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, run_several, i % 2 == 0 ? keep : NULL) == 0);
    for (int i = 0; i < 4; i++) CHECK(pthread_join(threads[i], NULL) == 0);
}

int main(void) {
    char folder[PATH_MAX];
    make_folder(folder);
    make_scratch(&scratch, folder, "file", 1500 * 1000 + 77, 1);
    make_tensors(20000, 1);
    run_whole(keep, 0, 0, 100000, true); /* whatever a sanitizer starts is started now */
    test_all_ways();
    test_beginnings();
    test_nothing_to_read();
    test_window(200000, 5000);
    test_window(400000, 30000);
    test_window(1, 20000);
    test_impatience();
    test_closing();
    test_truncations();
    test_threads_in_turn();
    test_streams_beside_each_other();
    remove_scratch(&scratch);
    CHECK(rmdir(folder) == 0);
    return 0;
}
