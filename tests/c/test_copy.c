/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: many pieces are copied as memcpy() would, however they are cut into shares, and not
 * a byte beside them is written to.
 */
#include "copy.h"

#include <dirent.h>
#include <string.h>

#include "check.h"

#define MIB (UINT64_C(1) << 20)
#define POOL_BYTES (26 * MIB)
#define PIECES_MAX 4000
#define UNTOUCHED 0x5A

static char *source, *target, *expected;

/* Lay `copies` out with holes in source and target, run them, compare all of the target. */
static void run(struct stx_copy *copies, size_t count, uint64_t *seed) {
    uint64_t from = random_below(seed, 100), to = random_below(seed, 100);
    memset(target, UNTOUCHED, POOL_BYTES);
    memset(expected, UNTOUCHED, POOL_BYTES);
    for (size_t i = 0; i < count; i++) {
        if (from + copies[i].size_bytes > POOL_BYTES) from = random_below(seed, 100);
        CHECK(to + copies[i].size_bytes <= POOL_BYTES);
        copies[i].source = source + from;
        copies[i].target = target + to;
        memcpy(expected + to, source + from, copies[i].size_bytes);
        from += copies[i].size_bytes + random_below(seed, 3);
        to += copies[i].size_bytes + random_below(seed, 3) * random_below(seed, 60);
    }
    stx_copy_run(copies, count);
    CHECK(memcmp(target, expected, POOL_BYTES) == 0);
}

static void test_nothing(void) {
    struct stx_copy copies[3] = {{NULL, NULL, 0}, {NULL, NULL, 0}, {NULL, NULL, 0}};
    stx_copy_run(NULL, 0);
    stx_copy_run(copies, 0);
    stx_copy_run(copies, 3);
}

/* One piece of sizes around what is shared out among one, two, three, four threads. */
static void test_one(uint64_t *seed) {
    const uint64_t sizes[] = {1,           4095,         4 * MIB - 1, 4 * MIB,
                              8 * MIB - 1, 8 * MIB,      8 * MIB + 1, 12 * MIB + 7,
                              16 * MIB,    16 * MIB + 1, 25 * MIB + 3};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        struct stx_copy copy = {.size_bytes = sizes[i]};
        run(&copy, 1, seed);
    }
}

/* Pieces of which some are empty, some tiny, and some larger than a share. */
static void test_many(uint64_t *seed) {
    static struct stx_copy copies[PIECES_MAX];
    for (int round = 0; round < 9; round++) {
        const uint64_t most_bytes = UINT64_C(1) << (3 * (unsigned)round);
        uint64_t left_bytes = 24 * MIB;
        size_t count = 0;
        while (count < PIECES_MAX && left_bytes != 0) {
            uint64_t size_bytes = random_below(seed, most_bytes + 1);
            if (random_below(seed, 4) == 0) size_bytes = 0;
            if (random_below(seed, 50) == 0) size_bytes = random_below(seed, 9 * MIB);
            if (size_bytes > left_bytes) size_bytes = left_bytes;
            copies[count++] = (struct stx_copy){.size_bytes = size_bytes};
            left_bytes -= size_bytes;
        }
        run(copies, count, seed);
    }
}

/* Share borders that fall on piece borders, and pieces before and behind all that has bytes. */
static void test_borders(uint64_t *seed) {
    struct stx_copy copies[10];
    for (uint64_t off_by = 0; off_by < 3; off_by++) {
        memset(copies, 0, sizeof copies);
        for (size_t i = 1; i < 9; i++) copies[i].size_bytes = 2 * MIB;
        copies[4].size_bytes += off_by;
        copies[5].size_bytes -= off_by == 2 ? 1 : 0;
        run(copies, 10, seed);
    }
}

static int count_threads(void) {
    int count = 0;
    DIR *const folder = opendir("/proc/self/task");
    CHECK(folder != NULL);
    while (readdir(folder) != NULL) count++;
    CHECK(closedir(folder) == 0);
    return count;
}

int main(void) {
    uint64_t seed = 3;
    source = malloc(POOL_BYTES);
    target = malloc(POOL_BYTES);
    expected = malloc(POOL_BYTES);
    CHECK(source != NULL && target != NULL && expected != NULL);
    for (uint64_t i = 0; i < POOL_BYTES; i += 8) {
        const uint64_t value = next_random(&seed);
        memcpy(source + i, &value, 8);
    }
    test_nothing();
    test_one(&seed); /* whatever a sanitizer starts is started now */
    const int threads = count_threads();
    test_many(&seed);
    test_borders(&seed);
    CHECK(count_threads() <= threads);
    free(source);
    free(target);
    free(expected);
    return 0;
}
