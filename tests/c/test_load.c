/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: the loop brings every piece whole with either engine, keeps to its budget, waits for
 * memory, tells where a file was cut off, and stops at once when it is told to.
 */
#include <time.h>

#include "loading.h"

static struct stx_err err;
static struct world world;
static struct stx_load_result result;
static struct stx_engine engine, inner;
static struct faulty faulty;

static const enum stx_engine_kind kinds[] = {STX_ENGINE_URING, STX_ENGINE_THREADS, STX_ENGINE_AUTO};
#define KINDS_COUNT (sizeof kinds / sizeof kinds[0])

/* A load as users run it; all of it must be there. False where there is no such engine. */
static bool run_plain(enum stx_engine_kind kind, uint64_t inflight_bytes, bool answers_later,
                      size_t off_by) {
    struct consumer consumer = consumer_make(&world);
    consumer.off_by = off_by;
    struct stx_load_job job = world_job(&world, &consumer);
    consumer.answers_later = answers_later;
    job.limits = (struct stx_load_limits){inflight_bytes, kind, 2};
    const enum stx_status status = stx_load_run(&job, &result, &err);
    CHECK(!result.cancelled && result.failed_file == STX_LOAD_NO_FILE);
    if (status == STX_ERR_UNSUPPORTED) {
        CHECK(kind == STX_ENGINE_URING && strcmp(result.engine, "none") == 0);
        CHECK(strcmp(err.message, stx_engine_refusal()) == 0);
        return false;
    }
    CHECK(status == STX_OK && result.requests == world.reads_count && result.retries == 0);
    CHECK(kind != STX_ENGINE_URING || strcmp(result.engine, "uring") == 0);
    CHECK(kind != STX_ENGINE_THREADS || strcmp(result.engine, "threads") == 0);
    CHECK(result.bytes_read == world.bytes && (consumer.laters != 0) == answers_later);
    consumer_check_and_free(&consumer, true);
    return true;
}

static void test_runs(void) {
    const uint64_t sizes[] = {4096, 65536, 1 << 20};
    for (size_t i = 0; i < KINDS_COUNT * 3 * 2; i++) {
        const enum stx_engine_kind kind = kinds[i % KINDS_COUNT];
        const bool direct = i / KINDS_COUNT % 2 == 1;
        if (direct && !world_has_direct(&world)) continue;
        world_use_direct(&world, direct);
        world_cut(&world, sizes[i / (KINDS_COUNT * 2)], 0);
        for (int j = 0; j < 4; j++)
            if (run_plain(kind, j < 2 ? 0 : 100000, j % 2 == 1, 0)) CHECK(result.direct == direct);
        /* What is not aligned, in memory or in the file, goes through the cache, whatever the
         * descriptors. */
        if (run_plain(kind, 0, true, 512)) CHECK(!result.direct);
        world_cut(&world, sizes[i / (KINDS_COUNT * 2)] + 1, 77);
        if (run_plain(kind, 0, true, 0)) CHECK(!result.direct);
    }
}

static void test_nothing_to_do(void) {
    struct consumer consumer = consumer_make(&world);
    struct stx_load_job job = world_job(&world, &consumer);
    job.files_count = 0;
    job.reads_count = job.pieces_count = 0;
    CHECK(stx_load_run(&job, &result, &err) == STX_OK && result.requests == 0);
    CHECK(consumer.calls == 0 && consumer.asked == 0 && !result.cancelled);
}

static void open_faulty(size_t i, bool direct, uint32_t depth) {
    struct stx_engine_options options = {kinds[i], depth, 2};
    if (stx_engine_open(&inner, &options, &err) != STX_OK) {
        CHECK(kinds[i] == STX_ENGINE_URING && err.status == STX_ERR_UNSUPPORTED);
        options.kind = STX_ENGINE_AUTO;
        CHECK(stx_engine_open(&inner, &options, &err) == STX_OK);
    }
    world_use_direct(&world, direct);
    faulty_open(&engine, &faulty, &inner);
}

static void test_budget(size_t kind) {
    const uint64_t limits[] = {1, 20480, 50000, 200000, 1 << 20};
    for (size_t i = 0; i < sizeof limits / sizeof limits[0]; i++) {
        struct consumer consumer = consumer_make(&world);
        world_cut(&world, 20480, 0);
        open_faulty(kind, false, i % 2 == 0 ? 64 : 5);
        CHECK(run_faulty(&engine, &faulty, &consumer, limits[i], &result, &err) == STX_OK);
        consumer_check_and_free(&consumer, true);
        /* A read larger than the budget goes, but alone. */
        CHECK(faulty.inflight_bytes_max <= (limits[i] < 20480 ? 20480 : limits[i]));
        CHECK(limits[i] > 20480 || faulty.inflight_max == 1);
        CHECK(faulty.inflight_max <= (i % 2 == 0 ? 64u : 5u));
        CHECK(limits[i] < 50000 || faulty.inflight_max >= 2);
    }
}

/* Cancelled after request `number`: nothing more begins, everything is drained. */
static void test_cancelling(size_t kind, uint32_t depth) {
    world_cut(&world, 20480, 0);
    for (uint64_t number = 1; number <= world.reads_count; number++) {
        struct consumer consumer = consumer_make(&world);
        open_faulty(kind, world_has_direct(&world) && number % 2 == 0, depth);
        faulty.deaf_from = number - 1;
        consumer.cancel_from = number;
        CHECK(run_faulty(&engine, &faulty, &consumer, number % 3 * 50000, &result, &err) == STX_OK);
        CHECK(result.cancelled && faulty.submitted >= number && faulty.reaped == faulty.submitted);
        CHECK(depth != 1 || faulty.submitted == number);
        consumer_check_and_free(&consumer, false);
    }
}

/* A hook says no at piece `i`. */
static void test_refusals(size_t kind) {
    world_cut(&world, 20480, 0);
    for (size_t i = 0; i < world.pieces_count; i++) {
        struct consumer consumer = consumer_make(&world);
        open_faulty(kind, false, 64);
        consumer.stop_at = i;
        CHECK(run_faulty(&engine, &faulty, &consumer, 0, &result, &err) == STX_OK);
        CHECK(result.cancelled && faulty.reaped == faulty.submitted);
        consumer_check_and_free(&consumer, false);

        consumer = consumer_make(&world);
        open_faulty(kind, false, 8);
        consumer.fail_at = i;
        CHECK(run_faulty(&engine, &faulty, &consumer, 0, &result, &err) == STX_ERR_MEMORY);
        CHECK(!result.cancelled && result.failed_file == STX_LOAD_NO_FILE);
        CHECK(faulty.reaped == faulty.submitted);
        consumer_check_and_free(&consumer, false);
    }
}

/* The second file is cut off after it was opened. */
static void test_truncation(size_t kind, bool direct, uint64_t left_bytes, uint32_t depth) {
    char expected[64];
    struct consumer consumer = consumer_make(&world);
    struct scratch *scratch = &world.scratch[1];
    world_cut(&world, 20480, 0);
    CHECK(truncate(scratch->path, (off_t)left_bytes) == 0);
    open_faulty(kind, direct, depth);
    CHECK(run_faulty(&engine, &faulty, &consumer, 0, &result, &err) == STX_ERR_IO);
    CHECK(err.sys_errno == 0 && result.failed_file == 1);
    if (depth == 1) {
        /* Where the first read that wants more than there is meets the end. */
        uint64_t end_bytes = UINT64_MAX;
        for (size_t i = 0; i < world.reads_count && end_bytes == UINT64_MAX; i++) {
            const struct stx_read *read = &world.reads[i];
            if (read->file_index != 1 || read->end_bytes <= left_bytes) continue;
            end_bytes = read->begin_bytes > left_bytes ? read->begin_bytes : left_bytes;
        }
        CHECK(result.failed_offset_bytes == end_bytes);
    }
    (void)snprintf(expected, sizeof expected, "file truncated at byte %llu",
                   (unsigned long long)result.failed_offset_bytes);
    CHECK(strcmp(err.message, expected) == 0);
    consumer_check_and_free(&consumer, false);
    FILE *file = fopen(scratch->path, "r+b");
    CHECK(file != NULL &&
          fwrite(scratch->bytes, 1, scratch->size_bytes, file) == scratch->size_bytes);
    CHECK(fclose(file) == 0);
}

static void test_truncations(size_t kind) {
    const uint64_t lengths[] = {0, 1, 4096, 5000, 20480, 50001, 159000, 161076};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        test_truncation(kind, false, lengths[i], 64);
        test_truncation(kind, false, lengths[i], 1);
        if (!world_has_direct(&world)) continue;
        test_truncation(kind, true, lengths[i], 64);
        test_truncation(kind, true, lengths[i], 1);
    }
}

/* Bytes in flight of an engine that reads nothing, and in whose first or second window of 256 MiB
 * every completion takes longer. */
struct idle {
    uint32_t tags[STX_ENGINE_DEPTH_MAX], count;
    uint64_t reaped_bytes, inflight_bytes, inflight_bytes_max;
    bool is_slow_first;
};

#define IDLE_READ_BYTES (UINT64_C(4) << 20)

static enum stx_status idle_submit(struct stx_engine *self, const struct stx_io *io,
                                   struct stx_err *unused) {
    struct idle *idle = self->state;
    (void)unused;
    idle->tags[idle->count++] = io->tag;
    idle->inflight_bytes += io->size_bytes;
    if (idle->inflight_bytes > idle->inflight_bytes_max)
        idle->inflight_bytes_max = idle->inflight_bytes;
    return STX_OK;
}

static enum stx_status idle_reap(struct stx_engine *self, struct stx_io_done done[],
                                 uint32_t capacity, uint32_t timeout_ms, uint32_t *count,
                                 struct stx_err *unused) {
    struct idle *idle = self->state;
    const bool is_first = idle->reaped_bytes < UINT64_C(256) << 20;
    (void)capacity;
    (void)timeout_ms;
    (void)unused;
    if (is_first == idle->is_slow_first)
        (void)nanosleep(&(struct timespec){.tv_nsec = 2000000}, NULL);
    done[0] = (struct stx_io_done){idle->tags[--idle->count], (int32_t)IDLE_READ_BYTES};
    idle->inflight_bytes -= IDLE_READ_BYTES;
    idle->reaped_bytes += IDLE_READ_BYTES;
    *count = 1;
    return STX_OK;
}

static enum stx_load_next give_any(void *context, size_t piece, bool may_wait, char **memory) {
    (void)piece;
    (void)may_wait;
    *memory = context;
    return STX_LOAD_READY;
}

static void ignore_done(void *context, size_t piece) {
    (void)context;
    (void)piece;
}

static bool go_on(void *context) {
    (void)context;
    return true;
}

static void test_growth(bool is_slow_first, uint64_t expected_bytes) {
    static const struct stx_engine_ops ops = {"idle", NULL, idle_submit, idle_reap, NULL};
    static struct stx_read reads[200];
    char memory;
    struct idle idle = {.is_slow_first = is_slow_first};
    struct stx_engine self = {.ops = &ops, .state = &idle, .depth = 64};
    const struct stx_load_file file = {
        .fd = -1, .direct_fd = -1, .size_bytes = 200 * IDLE_READ_BYTES};
    const struct stx_load_piece piece = {0, 200};
    for (size_t i = 0; i < 200; i++)
        reads[i] = (struct stx_read){.begin_bytes = i * IDLE_READ_BYTES,
                                     .end_bytes = (i + 1) * IDLE_READ_BYTES};
    const struct stx_load_job job = {
        .files = &file,
        .reads = reads,
        .pieces = &piece,
        .files_count = 1,
        .reads_count = 200,
        .pieces_count = 1,
        .hooks = {&memory, give_any, ignore_done, go_on},
    };
    CHECK(stx_load_run_on(&self, &job, &result, &err) == STX_OK && result.requests == 200);
    CHECK(idle.inflight_bytes_max == expected_bytes);
}

int main(void) {
    char folder[PATH_MAX];
    make_folder(folder);
    world_make(&world, folder, 160 * 1000 + 77);
    const int descriptors = count_entries("/proc/self/fd");
    test_runs();
    test_nothing_to_do();
    test_growth(true, UINT64_C(64) << 20);
    test_growth(false, UINT64_C(32) << 20);
    for (size_t kind = 0; kind < KINDS_COUNT - 1; kind++) {
        test_budget(kind);
        test_cancelling(kind, 64);
        test_cancelling(kind, 1);
        test_refusals(kind);
        test_truncations(kind);
    }
    CHECK(count_entries("/proc/self/fd") == descriptors);
    world_free(&world);
    CHECK(rmdir(folder) == 0);
    return 0;
}
