/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: helpers read what they are told and nothing else, keep a mapping only while it
 * has users, survive a truncated file and a fork, and leave when they have nothing to do.
 */
#include "readahead.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "residency.h"

#define MIB (UINT64_C(1) << 20)
#define FILE_BYTES (64 * MIB)
#define LIMIT_BYTES (1024 * MIB)

/* ThreadSanitizer would end a child that starts threads. */
const char *__tsan_default_options(void);
const char *__tsan_default_options(void) { return "die_after_fork=0"; }

static char path[] = "/tmp/stx-readahead-XXXXXX";
static struct stx_err err;

static void make_file(void) {
    char *block = malloc(MIB);
    const int fd = mkstemp(path);
    CHECK(fd >= 0 && block != NULL);
    for (uint64_t i = 0; i < FILE_BYTES / MIB; i++) {
        memset(block, (int)i, MIB);
        CHECK(write(fd, block, MIB) == (ssize_t)MIB);
    }
    free(block);
    CHECK(fsync(fd) == 0 && close(fd) == 0);
}

static uint64_t resident_bytes(const struct stx_mapping *mapping, uint64_t begin, uint64_t end) {
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    unsigned char *pages = malloc((end - begin) / page + 1);
    uint64_t count = 0;
    CHECK(mincore(stx_mapping_bytes(mapping) + begin, end - begin, pages) == 0);
    for (uint64_t i = 0; i < (end - begin) / page; i++) count += pages[i] & 1;
    free(pages);
    return count * page;
}

/* A new mapping of the file, which is not in the page cache where the file system can do that. */
static struct stx_mapping *open_cold(bool *cold) {
    struct stx_file file;
    struct stx_mapping *mapping = NULL;
    CHECK(stx_file_open(&file, path, &err) == STX_OK);
    stx_file_expect_random(&file);
    CHECK(stx_mapping_open(&mapping, &file, &err) == STX_OK);
    for (int i = 0; i < 5 && resident_bytes(mapping, 0, FILE_BYTES) != 0; i++)
        (void)posix_fadvise(file.fd, 0, 0, POSIX_FADV_DONTNEED);
    *cold = resident_bytes(mapping, 0, FILE_BYTES) == 0;
    stx_file_close(&file);
    const struct stx_range all = {0, FILE_BYTES};
    CHECK(!*cold || stx_residency_ask(mapping, &all, 1) != STX_RESIDENCY_WARM);
    return mapping;
}

/* Nearly all: a system may take pages back at any time. */
#define NEARLY(bytes) ((bytes) - (bytes) / 20)

/* Reads that were started by a demand itself are not waited for by anybody. */
static void wait_for(const struct stx_mapping *mapping, uint64_t begin, uint64_t end) {
    CHECK(stx_readahead_settle(20000));
    for (int i = 0; i < 5000 && resident_bytes(mapping, begin, end) < NEARLY(end - begin); i++)
        (void)usleep(1000);
    CHECK(resident_bytes(mapping, begin, end) >= NEARLY(end - begin));
}

static void exactly_the_ranges_are_read(void) {
    bool cold;
    struct stx_mapping *mapping = open_cold(&cold);
    struct stx_range *ranges = calloc(4, sizeof *ranges);
    for (uint64_t i = 0; i < 4; i++)
        ranges[i] = (struct stx_range){i * 16 * MIB, i * 16 * MIB + MIB};
    stx_readahead_all(mapping, ranges, 4, false, LIMIT_BYTES);
    for (uint64_t i = 0; i < 4; i++) wait_for(mapping, i * 16 * MIB, i * 16 * MIB + MIB);
    if (cold) CHECK(resident_bytes(mapping, 0, FILE_BYTES) <= 4 * MIB);
    CHECK(stx_mapping_bytes(mapping)[16 * MIB] == 16);
    stx_mapping_release(mapping);
}

static void a_short_demand_is_read_without_helpers(void) {
    bool cold;
    struct stx_mapping *mapping = open_cold(&cold);
    const uint64_t before = stx_readahead_count().bytes;
    stx_readahead_one(mapping, 5 * MIB + 100, 6 * MIB + 100);
    CHECK(stx_readahead_count().bytes - before == MIB + 4096);
    CHECK(stx_mapping_bytes(mapping)[5 * MIB + 100] == 5);
    if (cold) CHECK(resident_bytes(mapping, 8 * MIB, FILE_BYTES) == 0);
    stx_mapping_release(mapping);
}

static void a_consumer_is_followed(void) {
    bool cold;
    struct stx_mapping *mapping = open_cold(&cold);
    struct stx_range *tensors = calloc(64, sizeof *tensors);
    uint32_t *orders[STX_FOLLOW_ORDERS - 1] = {NULL};
    for (uint64_t i = 0; i < 64; i++) tensors[i] = (struct stx_range){i * MIB, (i + 1) * MIB};
    stx_readahead_prepare(mapping, tensors, 64, orders, false, LIMIT_BYTES);
    CHECK(stx_readahead_is_prepared(mapping));
    if (cold) CHECK(resident_bytes(mapping, 0, FILE_BYTES) == 0);
    for (uint64_t i = 0; i < 4; i++) stx_readahead_demand(mapping, i, i * MIB, (i + 1) * MIB);
    wait_for(mapping, 4 * MIB, 8 * MIB);
    if (cold) CHECK(resident_bytes(mapping, 32 * MIB, FILE_BYTES) == 0);
    for (uint64_t i = 4; i < 64; i++) stx_readahead_demand(mapping, i, i * MIB, (i + 1) * MIB);
    wait_for(mapping, 0, FILE_BYTES);
    stx_mapping_release(mapping);
}

static bool is_mapped(const char *bytes) {
    unsigned char page;
    return mincore((void *)(uintptr_t)bytes, 1, &page) == 0;
}

/* Dropped while helpers read: nothing is left mapped once they are done. */
static void helpers_leave_with_the_last_user(void) {
    for (int round = 0; round < 20; round++) {
        bool cold;
        struct stx_mapping *mapping = open_cold(&cold);
        const char *const bytes = stx_mapping_bytes(mapping);
        struct stx_range *ranges = calloc(1, sizeof *ranges);
        ranges[0] = (struct stx_range){0, FILE_BYTES};
        stx_readahead_all(mapping, ranges, 1, true, LIMIT_BYTES);
        stx_mapping_release(mapping);
        CHECK(stx_readahead_settle(20000));
        for (int i = 0; i < 1000 && is_mapped(bytes); i++) (void)usleep(1000);
        CHECK(!is_mapped(bytes));
    }
}

static void a_truncated_file_is_counted(void) {
    bool cold;
    struct stx_mapping *mapping = open_cold(&cold);
    struct stx_range *ranges = calloc(1, sizeof *ranges);
    const uint64_t before = stx_readahead_count().failures;
    ranges[0] = (struct stx_range){0, FILE_BYTES};
    CHECK(truncate(path, (off_t)(8 * MIB)) == 0);
    stx_readahead_all(mapping, ranges, 1, true, LIMIT_BYTES);
    CHECK(stx_readahead_settle(20000));
    CHECK(stx_readahead_count().failures > before);
    stx_mapping_release(mapping);
    CHECK(unlink(path) == 0);
    memcpy(path + strlen(path) - 6, "XXXXXX", 6);
    make_file();
}

static void *consume(void *mapping) {
    for (uint64_t i = 0; i < 64; i++) stx_readahead_demand(mapping, i, i * MIB, (i + 1) * MIB);
    return NULL;
}

static void many_threads_may_ask(void) {
    bool cold;
    struct stx_mapping *mapping = open_cold(&cold);
    struct stx_range *tensors = calloc(64, sizeof *tensors);
    uint32_t *orders[STX_FOLLOW_ORDERS - 1] = {NULL};
    pthread_t threads[4];
    for (uint64_t i = 0; i < 64; i++) tensors[i] = (struct stx_range){i * MIB, (i + 1) * MIB};
    stx_readahead_prepare(mapping, tensors, 64, orders, true, LIMIT_BYTES);
    for (int i = 0; i < 4; i++) CHECK(pthread_create(&threads[i], NULL, consume, mapping) == 0);
    for (int i = 0; i < 4; i++) CHECK(pthread_join(threads[i], NULL) == 0);
    wait_for(mapping, 0, FILE_BYTES);
    stx_mapping_release(mapping);
}

/* The child has no helpers, makes its own, and is not kept from unmapping. */
static void a_fork_in_the_middle(void) {
    bool cold;
    struct stx_mapping *mapping = open_cold(&cold);
    const char *const bytes = stx_mapping_bytes(mapping);
    struct stx_range *ranges = calloc(1, sizeof *ranges);
    ranges[0] = (struct stx_range){0, FILE_BYTES};
    stx_readahead_all(mapping, ranges, 1, true, LIMIT_BYTES);
    (void)usleep(5000); /* sanitizers do not like threads that are just being made */
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        bool ignored;
        if (!stx_readahead_settle(0) || stx_readahead_count().threads != 0) _exit(1);
        stx_mapping_release(mapping);
        if (is_mapped(bytes)) _exit(2);
        mapping = open_cold(&ignored);
        ranges = calloc(1, sizeof *ranges);
        ranges[0] = (struct stx_range){0, FILE_BYTES};
        stx_readahead_all(mapping, ranges, 1, true, LIMIT_BYTES);
        if (!stx_readahead_settle(20000)) _exit(3);
        _exit(resident_bytes(mapping, 0, FILE_BYTES) >= NEARLY(FILE_BYTES) ? 0 : 4);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(stx_readahead_settle(20000));
    stx_mapping_release(mapping);
}

static void idle_helpers_leave(void) {
    for (int i = 0; i < 5000 && stx_readahead_count().threads != 0; i++) (void)usleep(1000);
    CHECK(stx_readahead_count().threads == 0);
}

static void there_is_a_limit(void) {
    CHECK(stx_residency_free_bytes() > MIB);
    CHECK(stx_residency_free_bytes() < (uint64_t)1 << 50);
}

int main(void) {
    make_file();
    exactly_the_ranges_are_read();
    a_short_demand_is_read_without_helpers();
    a_consumer_is_followed();
    helpers_leave_with_the_last_user();
    a_truncated_file_is_counted();
    for (int i = 0; i < 10; i++) many_threads_may_ask();
    a_fork_in_the_middle();
    idle_helpers_leave();
    there_is_a_limit();
    CHECK(unlink(path) == 0);
    return 0;
}
