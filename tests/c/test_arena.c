/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: memory of tensors is aligned and fresh, goes back page by page without touching a
 * neighbour's bytes, and all of it with the last user, whichever thread that is.
 */
#include "arena.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"

#define KIB (UINT64_C(1) << 10)
#define MIB (UINT64_C(1) << 20)
#define FILLED 0xAB
#define THREADS 8

static struct stx_err err;

static const uint64_t sizes[] = {
    0,
    1,
    63,
    64,
    4095,
    4096,
    100 * KIB + 1,
    256 * KIB - 1,
    256 * KIB,
    256 * KIB + 1,
    MIB + 4095,
    2 * MIB - 1,
    2 * MIB,
    2 * MIB + 1,
    9 * MIB + 12345,
};
#define SIZES_COUNT (sizeof sizes / sizeof sizes[0])

static struct stx_arena *make(uint64_t size_bytes) {
    struct stx_arena *arena = NULL;
    CHECK(stx_arena_open(&arena, size_bytes, &err) == STX_OK && arena != NULL);
    return arena;
}

static bool is_in_pages(uint64_t size_bytes) { return size_bytes >= 256 * KIB; }

static uint64_t page_size(void) { return (uint64_t)sysconf(_SC_PAGESIZE); }

/* How many pages of [begin, end), which is whole pages, are in memory; or UINT64_MAX where some are
 * not mapped. */
static uint64_t count_pages(const char *bytes, uint64_t begin, uint64_t end) {
    const uint64_t count = (end - begin) / page_size();
    unsigned char *const pages = malloc(count + 1);
    uint64_t present = 0;
    CHECK(pages != NULL);
    if (count != 0 && mincore((void *)(uintptr_t)(bytes + begin), end - begin, pages) != 0) {
        CHECK(errno == ENOMEM);
        present = UINT64_MAX;
    }
    for (uint64_t i = 0; present != UINT64_MAX && i < count; i++) present += pages[i] & 1u;
    free(pages);
    return present;
}

static void test_sizes(void) {
    for (size_t i = 0; i < SIZES_COUNT; i++) {
        struct stx_arena *arenas[5];
        for (unsigned j = 0; j < 5; j++) {
            arenas[j] = make(sizes[i]);
            const uint64_t address = (uint64_t)(uintptr_t)stx_arena_bytes(arenas[j]);
            CHECK(address != 0 && address % (is_in_pages(sizes[i]) ? 4096 : 64) == 0);
            CHECK(stx_arena_size_bytes(arenas[j]) == sizes[i]);
            memset(stx_arena_bytes(arenas[j]), (int)j, sizes[i]);
        }
        for (unsigned j = 0; j < 5; j++)
            for (uint64_t at = 0; at < sizes[i]; at++)
                CHECK(stx_arena_bytes(arenas[j])[at] == (char)j);
        for (unsigned j = 0; j < 5; j++) stx_arena_release(arenas[j]);
    }
    stx_arena_release(NULL);
}

/* Memory in pages is there once it is asked for or touched, and nothing beside. */
static void test_populating(void) {
    for (size_t i = 0; i < SIZES_COUNT; i++) {
        struct stx_arena *const arena = make(sizes[i]);
        char *const bytes = stx_arena_bytes(arena);
        const uint64_t whole_bytes = sizes[i] / page_size() * page_size();
        stx_arena_populate(arena, 0, 0);
        stx_arena_populate(arena, sizes[i], sizes[i]);
        stx_arena_populate(arena, sizes[i] / 2, sizes[i]);
        stx_arena_populate(arena, 0, sizes[i]);
        if (is_in_pages(sizes[i]))
            CHECK(count_pages(bytes, 0, whole_bytes) == whole_bytes / page_size());
        for (uint64_t at = 0; is_in_pages(sizes[i]) && at < sizes[i]; at++) CHECK(bytes[at] == 0);
        memset(bytes, FILLED, sizes[i]);
        stx_arena_populate(arena, 0, sizes[i]);
        for (uint64_t at = 0; at < sizes[i]; at++) CHECK(bytes[at] == (char)FILLED);
        stx_arena_release(arena);
    }
}

/* What is given back is zero afterwards where it is whole pages, and not in memory; nothing else
 * has changed. */
static void check_given_back(const struct stx_arena *arena, uint64_t begin, uint64_t end) {
    static char expected[10 * MIB];
    const uint64_t page = page_size(), size_bytes = stx_arena_size_bytes(arena);
    const uint64_t first = (begin + page - 1) / page * page, last = end / page * page;
    char *const bytes = stx_arena_bytes(arena);
    CHECK(size_bytes <= sizeof expected);
    memset(bytes, FILLED, size_bytes);
    memset(expected, FILLED, size_bytes);
    stx_arena_give_back(arena, begin, end);
    if (is_in_pages(size_bytes) && first < last) {
        CHECK(count_pages(bytes, first, last) == 0);
        memset(expected + first, 0, last - first);
    }
    CHECK(memcmp(bytes, expected, size_bytes) == 0);
}

static void test_giving_back(void) {
    uint64_t seed = 7;
    for (size_t i = 0; i < SIZES_COUNT; i++) {
        const uint64_t size_bytes = sizes[i];
        struct stx_arena *const arena = make(size_bytes);
        check_given_back(arena, 0, 0);
        check_given_back(arena, size_bytes, size_bytes);
        check_given_back(arena, 0, size_bytes);
        for (int round = 0; round < (size_bytes > MIB ? 4 : 40); round++) {
            uint64_t begin = random_below(&seed, size_bytes + 1);
            uint64_t end = begin + random_below(&seed, size_bytes - begin + 1);
            if (round % 4 == 1) end = begin + random_below(&seed, 4096) % (size_bytes - begin + 1);
            if (round % 4 == 2) begin -= begin % 4096;
            if (round % 4 == 3) end -= (end - begin) % 4096;
            check_given_back(arena, begin, end);
        }
        stx_arena_release(arena);
    }
}

/* Neighbours that end anywhere: each goes when it is dropped, in any order, and shows to the last
 * what it was. */
static void test_dropping_neighbours(void) {
    enum { COUNT = 37 };
    uint64_t seed = 11, ends[COUNT + 1] = {0};
    bool dropped[COUNT] = {false};
    for (unsigned i = 0; i < COUNT; i++)
        ends[i + 1] = ends[i] + random_below(&seed, i % 3 == 0 ? 300 : 100000);
    struct stx_arena *const arena = make(ends[COUNT] + 300 * KIB);
    char *const bytes = stx_arena_bytes(arena);
    for (unsigned i = 0; i < COUNT; i++) memset(bytes + ends[i], (int)i + 1, ends[i + 1] - ends[i]);
    for (unsigned left = COUNT; left != 0; left--) {
        unsigned which = (unsigned)random_below(&seed, COUNT);
        while (dropped[which]) which = (which + 1) % COUNT;
        dropped[which] = true;
        stx_arena_give_back(arena, ends[which], ends[which + 1]);
        for (unsigned i = 0; i < COUNT; i++)
            for (uint64_t at = ends[i]; !dropped[i] && at < ends[i + 1]; at++)
                CHECK(bytes[at] == (char)(i + 1));
    }
    stx_arena_release(arena);
}

static void test_releasing(void) {
    const uint64_t in_pages[] = {256 * KIB, MIB + 1, 2 * MIB, 64 * MIB + 4097};
    for (size_t i = 0; i < sizeof in_pages / sizeof in_pages[0]; i++) {
        struct stx_arena *const arena = make(in_pages[i]);
        const char *const bytes = stx_arena_bytes(arena);
        for (int users = 0; users < 5; users++) stx_arena_retain(arena);
        for (int users = 0; users < 5; users++) {
            stx_arena_release(arena);
            CHECK(count_pages(bytes, 0, 256 * KIB) != UINT64_MAX);
        }
        stx_arena_release(arena);
        CHECK(count_pages(bytes, 0, 256 * KIB) == UINT64_MAX);
    }
}

static void test_refused_sizes(void) {
    const uint64_t refused[] = {UINT64_C(1) << 48, (UINT64_C(1) << 62) + 1, INT64_MAX, UINT64_MAX};
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        struct stx_arena *arena = NULL;
        CHECK(stx_arena_open(&arena, refused[i], &err) == STX_ERR_MEMORY && arena == NULL);
        CHECK(err.status == STX_ERR_MEMORY && strstr(err.message, "no memory for") != NULL);
    }
}

/* --- threads --- */

struct user {
    struct stx_arena *arena; /* one use of it */
    uint64_t begin, end;
    int number;
    pthread_t thread;
};

/* Writes its own part, gives it back, leaves. */
static void *use(void *argument) {
    const struct user *const user = argument;
    char *const bytes = stx_arena_bytes(user->arena);
    for (int round = 0; round < 20; round++) {
        stx_arena_retain(user->arena);
        memset(bytes + user->begin, user->number, user->end - user->begin);
        for (uint64_t at = user->begin; at < user->end; at++)
            CHECK(bytes[at] == (char)user->number);
        stx_arena_give_back(user->arena, user->begin, user->end);
        stx_arena_populate(user->arena, user->begin, user->end);
        stx_arena_release(user->arena);
    }
    stx_arena_release(user->arena);
    return NULL;
}

static void test_threads(uint64_t size_bytes) {
    struct user users[THREADS];
    struct stx_arena *const arena = make(size_bytes);
    const char *const bytes = stx_arena_bytes(arena);
    for (int i = 0; i < THREADS; i++) {
        users[i] = (struct user){.arena = arena,
                                 .begin = size_bytes * (uint64_t)i / THREADS,
                                 .end = size_bytes * ((uint64_t)i + 1) / THREADS,
                                 .number = i + 1};
        stx_arena_retain(arena);
    }
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_create(&users[i].thread, NULL, use, &users[i]) == 0);
    stx_arena_release(arena); /* one of them is the last */
    for (int i = 0; i < THREADS; i++) CHECK(pthread_join(users[i].thread, NULL) == 0);
    if (is_in_pages(size_bytes)) CHECK(count_pages(bytes, 0, 4096) == UINT64_MAX);
}

int main(void) {
    test_sizes();
    test_populating();
    test_giving_back();
    test_dropping_neighbours();
    test_releasing();
    test_refused_sizes();
    test_threads(5000);
    test_threads(MIB + 77);
    test_threads(3 * MIB + 5);
    return 0;
}
