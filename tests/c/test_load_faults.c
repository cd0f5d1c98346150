/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: whatever goes wrong with whichever request of a load, its bytes are right or there
 * is one error; no piece is called done while something can still write into it; and nothing is
 * outstanding when the loop returns.
 */
#include "loading.h"

static struct stx_err err;
static struct world world;
static struct stx_load_result result;

struct way {
    enum stx_engine_kind kind;
    bool direct;
    uint32_t depth;
};

/* Set up an engine of that kind; false where there is none. The inner one lives in `inner`. */
static bool open_way(const struct way *way, struct stx_engine *engine, struct stx_engine *inner,
                     struct faulty *faulty) {
    const struct stx_engine_options options = {way->kind, way->depth, 3};
    const enum stx_status status = stx_engine_open(inner, &options, &err);
    CHECK(status == STX_OK || (way->kind == STX_ENGINE_URING && status == STX_ERR_UNSUPPORTED));
    if (status != STX_OK) return false;
    faulty_open(engine, faulty, inner);
    world_use_direct(&world, way->direct);
    return true;
}

static void check_error(int sys_errno) {
    char expected[64];
    CHECK(err.status == STX_ERR_IO && err.sys_errno == sys_errno);
    CHECK(result.failed_file < FILES_COUNT && !result.cancelled);
    (void)snprintf(expected, sizeof expected,
                   sys_errno == 0 ? "file truncated at byte %llu" : "pread at byte %llu: ",
                   (unsigned long long)result.failed_offset_bytes);
    CHECK(strncmp(err.message, expected, strlen(expected)) == 0);
}

static bool is_first_of_its_file(uint64_t number) {
    for (uint64_t i = 0; i < number; i++)
        if (world.reads[i].file_index == world.reads[number].file_index) return false;
    return true;
}

/* One request fails in one way. */
static void test_one_fault(const struct way *way, enum fault fault, uint64_t number) {
    struct stx_engine engine, inner;
    struct faulty faulty;
    struct consumer consumer = consumer_make(&world);
    if (!open_way(way, &engine, &inner, &faulty)) return;
    faulty.fault = fault;
    faulty.first = faulty.last = number;
    consumer.answers_later = number % 3 == 0;
    const enum stx_status status = run_faulty(&engine, &faulty, &consumer, 0, &result, &err);
    const bool refused_at_first = fault == FAULT_EINVAL && way->direct && status == STX_OK;
    switch (fault) {
        case FAULT_EIO:
            CHECK(status == STX_ERR_IO);
            check_error(EIO);
            break;
        case FAULT_EINVAL:
            /* Which answer comes first is open where several are under way. */
            if (way->depth == 1)
                CHECK((status == STX_OK) == (way->direct && is_first_of_its_file(number)));
            if (!refused_at_first) check_error(EINVAL);
            break;
        case FAULT_ZERO:
            CHECK(status == STX_ERR_IO);
            check_error(0);
            break;
        default:
            CHECK(status == STX_OK && result.retries == 1);
    }
    if (status == STX_OK) CHECK(result.requests == world.reads_count + result.retries);
    consumer_check_and_free(&consumer, status == STX_OK);
}

static void test_every_fault(const struct way *way) {
    for (int fault = FAULT_SHORT_1; fault < FAULT_COUNT; fault++)
        for (uint64_t number = 0; number < world.reads_count; number++)
            test_one_fault(way, (enum fault)fault, number);
}

/* Every request fails, or every one of one descriptor. */
static enum stx_status run_with_all(const struct way *way, enum fault fault, int only_fd,
                                    uint64_t last) {
    struct stx_engine engine, inner;
    struct faulty faulty;
    struct consumer consumer = consumer_make(&world);
    if (!open_way(way, &engine, &inner, &faulty)) return STX_ERR_UNSUPPORTED;
    faulty.fault = fault;
    faulty.first = 0;
    faulty.last = last;
    faulty.only_fd = only_fd;
    const enum stx_status status = run_faulty(&engine, &faulty, &consumer, 0, &result, &err);
    consumer_check_and_free(&consumer, status == STX_OK);
    return status;
}

static bool is(enum stx_status status, enum stx_status expected) {
    return status == expected || status == STX_ERR_UNSUPPORTED;
}

static void test_lasting_faults(const struct way *way) {
    const uint64_t always = UINT64_MAX - 1;
    /* Short every time: still whole, and never in a circle. */
    CHECK(is(run_with_all(way, FAULT_SHORT_1, -1, always), STX_OK));
    CHECK(is(run_with_all(way, FAULT_SHORT_5000, -1, 500), STX_OK));
    CHECK(is(run_with_all(way, FAULT_EINTR, -1, 500), STX_OK));
    CHECK(is(run_with_all(way, FAULT_EAGAIN, -1, 500), STX_OK));
    enum stx_status status = run_with_all(way, FAULT_EINTR, -1, always);
    CHECK(is(status, STX_ERR_IO));
    if (status == STX_ERR_IO) check_error(EINTR);
    if (!way->direct) return;
    /* One file has no direct reads, then none has. */
    status = run_with_all(way, FAULT_EINVAL, world.files[0].direct_fd, always);
    CHECK(is(status, STX_OK) && (status != STX_OK || result.direct));
    CHECK(status != STX_OK || result.retries != 0);
    const int direct_fd = world.scratch[1].direct_fd;
    world.scratch[1].direct_fd = -1;
    status = run_with_all(way, FAULT_EINVAL, world.files[0].direct_fd, always);
    CHECK(is(status, STX_OK) && (status != STX_OK || !result.direct));
    world.scratch[1].direct_fd = direct_fd;
}

/* A file system that gives one byte of every direct request. */
static void test_whims(const struct way *way) {
    if (!way->direct) return;
    const uint64_t always = UINT64_MAX - 1;
    world_cut(&world, 4096, 0);
    CHECK(is(run_with_all(way, FAULT_SHORT_5000, world.files[0].direct_fd, always), STX_OK));
}

static void test_engine_failures(const struct way *way) {
    for (uint64_t number = 0; number < world.reads_count; number += 5) {
        struct stx_engine engine, inner;
        struct faulty faulty;
        struct consumer consumer = consumer_make(&world);
        if (!open_way(way, &engine, &inner, &faulty)) return;
        faulty.submit_fails_at = number;
        CHECK(run_faulty(&engine, &faulty, &consumer, 0, &result, &err) == STX_ERR_IO);
        CHECK(err.sys_errno == ENOMEM && faulty.submitted == number);
        CHECK(result.failed_file == STX_LOAD_NO_FILE);
        consumer_check_and_free(&consumer, false);
        consumer = consumer_make(&world);
        CHECK(open_way(way, &engine, &inner, &faulty));
        faulty.reap_fails_at = number;
        const enum stx_status status = run_faulty(&engine, &faulty, &consumer, 0, &result, &err);
        /* With all completions at once it has no chance to. */
        CHECK(status == STX_OK ? number != 0 : err.sys_errno == EBADF);
        consumer_check_and_free(&consumer, status == STX_OK); /* the engine is closed */
    }
}

int main(void) {
    static const struct way ways[] = {
        {STX_ENGINE_URING, false, 64},   {STX_ENGINE_URING, true, 64},
        {STX_ENGINE_URING, true, 1},     {STX_ENGINE_THREADS, false, 4},
        {STX_ENGINE_THREADS, true, 64},  {STX_ENGINE_THREADS, true, 1},
        {STX_ENGINE_THREADS, false, 64},
    };
    char folder[PATH_MAX];
    make_folder(folder);
    world_make(&world, folder, 160 * 1000 + 77);
    for (size_t i = 0; i < sizeof ways / sizeof ways[0]; i++) {
        if (ways[i].direct && !world_has_direct(&world)) continue;
        world_cut(&world, 20480, 0);
        test_every_fault(&ways[i]);
        test_lasting_faults(&ways[i]);
        test_engine_failures(&ways[i]);
        test_whims(&ways[i]);
    }
    world_free(&world);
    CHECK(rmdir(folder) == 0);
    return 0;
}
