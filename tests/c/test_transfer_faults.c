/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: after a failure of a transfer, at whichever call, no copy is under way and nothing
 * is left behind; and an engine that breaks half-way is done without. The linker wraps
 * stx_engine_open.
 */
#include "faulty.h"
#include "transferring.h"

/* Every call fails once; the targets are freed at once, and nothing writes to them later. */
static void test_every_failure(void) {
    uint64_t failures = 0;
    set_faults(NULL, NULL, "200");
    struct stx_staging *ring = open_ring();
    struct targets *all = make_targets(3 * MIB, 2 * MIB, 7);
    run(ring, all);
    const uint64_t calls_count = calls("any");
    free_targets(all);
    stx_staging_close(ring);
    for (uint64_t k = 1; k <= calls_count + 5; k++) {
        char fault[32];
        struct stx_staging *staging = NULL;
        const struct stx_device device = {.ops = cuda, .index = 1};
        struct stx_load_result result;
        CHECK(snprintf(fault, sizeof fault, "any:%llu", (unsigned long long)k) > 0);
        set_faults(fault, NULL, "200");
        struct targets *targets = make_targets(3 * MIB, 2 * MIB, 7);
        enum stx_status status = stx_staging_open(&staging, &device, RING_BYTES, &err);
        if (status == STX_OK) status = run_on(staging, targets, NULL, NULL, &result, &err);
        if (status == STX_OK) {
            check_whole(targets);
        } else {
            CHECK(status == STX_ERR_DEVICE && strstr(err.message, "injected") != NULL);
            failures++;
        }
        CHECK(last_error() == 0); /* torch would take it for its own */
        free_targets(targets);    /* what is copied later is found here */
        set_faults(NULL, NULL, NULL);
        if (staging != NULL) {
            check_ring(staging);
            targets = make_targets(3 * MIB, 2 * MIB, 7);
            run(staging, targets);
            free_targets(targets);
        }
        stx_staging_close(staging);
        CHECK(live() == 0);
    }
    CHECK(failures > 20 && calls_count > 30);
}

static void test_device_that_is_gone(void) {
    set_faults(NULL, NULL, NULL);
    struct stx_staging *staging = open_ring();
    struct targets *targets = make_targets(4 * MIB, 100, 9);
    struct stx_load_result result;
    set_faults(NULL, "cudaEventRecord", NULL);
    for (int i = 0; i < 4; i++)
        CHECK(run_on(staging, targets, NULL, NULL, &result, &err) == STX_ERR_DEVICE);
    set_faults(NULL, NULL, NULL);
    run(staging, targets);
    free_targets(targets);
    stx_staging_close(staging);
    CHECK(live() == 0);
}

static void test_cancelling(void) {
    set_faults(NULL, NULL, "2000");
    struct stx_staging *staging = open_ring();
    for (uint32_t patience = 0; patience < 4; patience++) {
        uint32_t left = patience;
        struct targets *targets = make_targets(40 * KIB, 2, 11);
        struct stx_load_result result;
        CHECK(run_on(staging, targets, NULL, &left, &result, &err) == STX_OK);
        if (!result.cancelled) check_whole(targets);
        CHECK(result.cancelled || patience != 0);
        free_targets(targets);
    }
    stx_staging_close(staging);
}

/* A file that ends before its last tensor does. */
static void test_a_file_that_was_cut(void) {
    set_faults(NULL, NULL, "500");
    struct stx_staging *staging = open_ring();
    struct targets *targets = make_targets(3 * MIB, 10, 13);
    struct stx_load_result result;
    CHECK(truncate(scratch.path, (off_t)(scratch.size_bytes / 2)) == 0);
    CHECK(run_on(staging, targets, NULL, NULL, &result, &err) == STX_ERR_IO);
    free_targets(targets);
    FILE *again = fopen(scratch.path, "r+b");
    CHECK(again != NULL &&
          fwrite(scratch.bytes, 1, scratch.size_bytes, again) == scratch.size_bytes &&
          fclose(again) == 0);
    targets = make_targets(3 * MIB, 10, 13);
    run(staging, targets);
    free_targets(targets);
    stx_staging_close(staging);
    CHECK(live() == 0);
}

/* --- engines that break --- */

/* The next engines break at these requests; UINT64_MAX: they do not. */
static uint64_t submit_breaks_at = UINT64_MAX, reap_breaks_at = UINT64_MAX;
static struct faulty faulty;
static struct stx_engine whole_engine;

enum stx_status __real_stx_engine_open(struct stx_engine *engine,
                                       const struct stx_engine_options *opening,
                                       struct stx_err *error);
enum stx_status __wrap_stx_engine_open(struct stx_engine *engine,
                                       const struct stx_engine_options *opening,
                                       struct stx_err *error);

/* What load.c gets. */
enum stx_status __wrap_stx_engine_open(struct stx_engine *engine,
                                       const struct stx_engine_options *opening,
                                       struct stx_err *error) {
    if (submit_breaks_at == UINT64_MAX && reap_breaks_at == UINT64_MAX)
        return __real_stx_engine_open(engine, opening, error);
    STX_TRY(__real_stx_engine_open(&whole_engine, opening, error));
    faulty_open(engine, &faulty, &whole_engine);
    faulty.submit_fails_at = submit_breaks_at;
    faulty.reap_fails_at = reap_breaks_at;
    return STX_OK;
}

/* What was read and what was not yet copied is right in the end, and no slot is lost. */
static void test_an_engine_that_breaks(void) {
    uint64_t requests = 0;
    set_faults(NULL, NULL, "1000");
    struct stx_staging *staging = open_ring();
    for (uint64_t at = 0; at == 0 || at <= requests; at++) {
        for (int reaps = 0; reaps < 2; reaps++) {
            struct targets *targets = make_targets(3 * MIB, 100, 17);
            submit_breaks_at = reaps ? UINT64_MAX : at;
            reap_breaks_at = reaps ? at : UINT64_MAX;
            run(staging, targets);
            if (at == 0) CHECK(faulty.reaped == 0);
            if (faulty.submitted > requests) requests = faulty.submitted;
            free_targets(targets);
            check_ring(staging);
        }
    }
    submit_breaks_at = reap_breaks_at = UINT64_MAX;
    CHECK(requests >= 6); /* of 24 MiB in slots of 4 */
    stx_staging_close(staging);
    CHECK(live() == 0);
}

int main(void) {
    char folder[PATH_MAX];
    open_world(folder);
    test_every_failure();
    test_device_that_is_gone();
    test_cancelling();
    test_a_file_that_was_cut();
    test_an_engine_that_breaks();
    close_world(folder);
    return 0;
}
