/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: every byte reaches its target on a device whose copies happen late, whatever the
 * sizes, from several threads, and the order with the caller's stream holds.
 */
#include <pthread.h>

#include "transferring.h"

static void test_sizes(void) {
    static const struct {
        uint64_t most, apart;
    } shapes[] = {{24 * MIB, 0},         {9 * MIB, 3}, {2 * KIB, 0},   {2 * KIB, 30},
                  {50 * KIB, 150 * KIB}, {1, 9000},    {5 * MIB, MIB}, {8192, 8192}};
    static const char *const delays[] = {NULL, "300"};
    for (size_t i = 0; i < 2 * sizeof shapes / sizeof shapes[0]; i++) {
        set_faults(NULL, NULL, delays[i % 2]);
        struct stx_staging *staging = open_ring();
        CHECK(stx_staging_is_pinned(staging));
        struct targets *targets = make_some(shapes[i / 2].most, shapes[i / 2].apart, i + 1,
                                            delays[i % 2] == NULL ? EXTENTS_MAX : 800);
        for (int again = 0; again < 2; again++) run(staging, targets);
        free_targets(targets);
        stx_staging_close(staging);
        CHECK(live() == 0);
    }
}

static void test_nothing(void) {
    struct stx_staging *staging = open_ring();
    struct targets *targets = calloc(1, sizeof *targets);
    CHECK(targets != NULL);
    run(staging, targets);
    free_targets(targets);
    stx_staging_close(staging);
}

/* What the caller had queued happens before, what it queues afterwards, after. */
static void test_order(void) {
    void *stream = NULL;
    set_faults(NULL, NULL, "20000");
    CHECK(set_device(1) == 0 && stream_create(&stream, 0) == 0 && set_device(3) == 0);
    struct stx_staging *staging = open_ring();
    struct targets *targets = make_targets(5 * MIB, 10, 5);
    char *const before = calloc(1, 100), *const after = calloc(1, 100);
    char *const target = (char *)(uintptr_t)targets->extents[0].target;
    struct stx_load_result result;
    CHECK(before != NULL && after != NULL);
    for (int i = 0; i < 3; i++) CHECK(copy_later(target, before, 100, 1, stream) == 0);
    CHECK(run_on(staging, targets, stream, NULL, &result, &err) == STX_OK);
    int device = 0;
    CHECK(get_device(&device) == 0 && device == 3); /* the caller's, as it was */
    CHECK(copy_later(after, target, 100, 1, stream) == 0);
    CHECK(stream_destroy(stream) == 0); /* waits for it */
    check_whole(targets);
    CHECK(memcmp(after, target, 100) == 0);
    free(before);
    free(after);
    free_targets(targets);
    stx_staging_close(staging);
    CHECK(live() == 0 && set_device(0) == 0);
}

/* Registration refused: slower, and right. */
static void test_not_pinned(void) {
    set_faults(NULL, "cudaHostRegister", "100");
    struct stx_staging *staging = open_ring();
    CHECK(!stx_staging_is_pinned(staging));
    struct targets *targets = make_targets(4 * MIB, 100, 9);
    run(staging, targets);
    free_targets(targets);
    stx_staging_close(staging);
    CHECK(live() == 0);
}

static void *run_beside(void *argument) {
    struct stx_staging *const staging = argument;
    struct stx_load_result result;
    struct stx_err error;
    for (uint64_t i = 0; i < 3; i++) {
        struct targets *targets = make_targets(3 * MIB, 100 * KIB, 20 + i);
        CHECK(run_on(staging, targets, NULL, NULL, &result, &error) == STX_OK);
        check_whole(targets);
        free_targets(targets);
    }
    return NULL;
}

static void test_loads_at_a_time(void) {
    pthread_t threads[5];
    struct stx_staging *staging = NULL, *same = NULL;
    set_faults(NULL, NULL, "200");
    CHECK(stx_staging_get(&staging, cuda, 0, RING_BYTES, &err) == STX_OK);
    CHECK(stx_staging_get(&same, cuda, 0, 1, &err) == STX_OK && same == staging);
    CHECK(stx_staging_get(&same, cuda, -1, 1, &err) == STX_ERR_UNSUPPORTED);
    for (size_t i = 0; i < 5; i++)
        CHECK(pthread_create(&threads[i], NULL, run_beside, staging) == 0);
    for (size_t i = 0; i < 5; i++) CHECK(pthread_join(threads[i], NULL) == 0);
}

/* The device that is none, by the same way. */
static void test_cpu(void) {
    struct stx_staging *staging = NULL;
    const struct stx_device device = {.ops = &stx_device_cpu};
    CHECK(stx_staging_open(&staging, &device, 1, &err) == STX_OK);
    struct targets *targets = make_targets(3 * MIB, 100 * KIB, 31);
    run(staging, targets);
    free_targets(targets);
    stx_staging_close(staging);
}

int main(void) {
    char folder[PATH_MAX];
    open_world(folder);
    test_sizes();
    test_nothing();
    test_order();
    test_not_pinned();
    test_loads_at_a_time();
    test_cpu();
    close_world(folder);
    return 0;
}
