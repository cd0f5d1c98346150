/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: every byte reaches its target on a device whose copies happen late, whatever the
 * sizes; the order with the caller's stream holds; and after a failure, at whichever call, no copy
 * is under way and nothing is left behind. The device is fake_cudart.c, whose path is in
 * STX_FAKE_CUDART.
 */
#include "transfer.h"

#include <dlfcn.h>
#include <pthread.h>

#include "scratch.h"

#define KIB (UINT64_C(1) << 10)
#define MIB (UINT64_C(1) << 20)
#define EXTENTS_MAX 12000
#define RING_BYTES (2 * STX_STAGING_SLOT_BYTES)

static struct stx_err err;
static struct scratch scratch;
static struct stx_file file;
static const struct stx_device_ops *cuda;
static const struct stx_owned_options options;

static int (*live)(void);
static uint64_t (*calls)(const char *name);
static void (*reset)(void);
static unsigned (*copy_later)(void *target, const void *source, size_t size, unsigned kind,
                              void *stream);
static unsigned (*stream_create)(void **stream, unsigned flags);
static unsigned (*stream_destroy)(void *stream);
static unsigned (*set_device)(int device);
static unsigned (*get_device)(int *device);
static unsigned (*last_error)(void);

static void bind_fake(void) {
    const char *path = getenv("STX_FAKE_CUDART");
    CHECK(path != NULL && stx_device_cuda_bind("/nothing/there.so", &err) == STX_ERR_UNSUPPORTED);
    CHECK(stx_device_cuda_bind(path, &err) == STX_OK);
    cuda = stx_device_cuda();
    CHECK(cuda != NULL);
    void *const library = dlopen(path, RTLD_LAZY);
    CHECK(library != NULL);
    *(void **)&live = dlsym(library, "fake_cudart_live");
    *(void **)&calls = dlsym(library, "fake_cudart_calls");
    *(void **)&reset = dlsym(library, "fake_cudart_reset");
    *(void **)&copy_later = dlsym(library, "cudaMemcpyAsync");
    *(void **)&stream_create = dlsym(library, "cudaStreamCreateWithFlags");
    *(void **)&stream_destroy = dlsym(library, "cudaStreamDestroy");
    CHECK(live != NULL && calls != NULL && reset != NULL && copy_later != NULL);
    *(void **)&set_device = dlsym(library, "cudaSetDevice");
    *(void **)&get_device = dlsym(library, "cudaGetDevice");
    CHECK(stream_create != NULL && stream_destroy != NULL);
    *(void **)&last_error = dlsym(library, "cudaGetLastError");
    CHECK(set_device != NULL && get_device != NULL && last_error != NULL);
}

/* Faults and delays from here on; NULL for none. */
static void set_faults(const char *fail, const char *fail_all, const char *delay_us) {
    CHECK(setenv("STX_FAKE_FAIL", fail == NULL ? "" : fail, 1) == 0);
    CHECK(setenv("STX_FAKE_FAIL_ALL", fail_all == NULL ? "" : fail_all, 1) == 0);
    CHECK(setenv("STX_FAKE_DELAY_US", delay_us == NULL ? "0" : delay_us, 1) == 0);
    reset();
}

/* --- extents --- */

struct targets {
    struct stx_extent extents[EXTENTS_MAX];
    size_t count;
};

static void add(struct targets *targets, uint64_t begin, uint64_t size) {
    CHECK(targets->count < EXTENTS_MAX && begin + size <= scratch.size_bytes);
    char *const memory = malloc((size_t)size);
    CHECK(memory != NULL);
    memset(memory, 0x11, (size_t)size);
    targets->extents[targets->count++] = (struct stx_extent){
        .begin_bytes = begin, .end_bytes = begin + size, .target = (uint64_t)(uintptr_t)memory};
}

/* Runs of bytes up to `most` long, `apart` from each other at most, over the whole file. */
static struct targets *make_some(uint64_t most, uint64_t apart, uint64_t seed, size_t limit) {
    struct targets *targets = calloc(1, sizeof *targets);
    CHECK(targets != NULL);
    uint64_t at = random_below(&seed, 9000);
    while (at < scratch.size_bytes && targets->count < limit) {
        uint64_t size = 1 + random_below(&seed, most);
        if (size > scratch.size_bytes - at) size = scratch.size_bytes - at;
        add(targets, at, size);
        at += size + (apart == 0 ? 0 : random_below(&seed, apart));
    }
    return targets;
}

static struct targets *make_targets(uint64_t most, uint64_t apart, uint64_t seed) {
    return make_some(most, apart, seed, EXTENTS_MAX);
}

static bool is_whole(const struct stx_extent *extent) {
    return memcmp((const void *)(uintptr_t)extent->target, scratch.bytes + extent->begin_bytes,
                  (size_t)(extent->end_bytes - extent->begin_bytes)) == 0;
}

static void check_whole(const struct targets *targets) {
    for (size_t i = 0; i < targets->count; i++) CHECK(is_whole(&targets->extents[i]));
}

static void free_targets(struct targets *targets) {
    for (size_t i = 0; i < targets->count; i++) free((void *)(uintptr_t)targets->extents[i].target);
    free(targets);
}

/* --- runs --- */

static bool go_on(void *context) {
    uint32_t *const left = context;
    if (left == NULL) return true;
    if (*left == 0) return false;
    --*left;
    return true;
}

static struct stx_staging *open_ring(void) {
    struct stx_staging *staging = NULL;
    const struct stx_device device = {.ops = cuda, .index = 1};
    CHECK(stx_staging_open(&staging, &device, RING_BYTES, &err) == STX_OK);
    return staging;
}

static enum stx_status run_on(struct stx_staging *staging, const struct targets *targets,
                              void *stream, uint32_t *patience_left, struct stx_load_result *result,
                              struct stx_err *error) {
    const struct stx_owned_patience patience = {.keep_going = go_on, .context = patience_left};
    const struct stx_transfer transfer = {.file = &file,
                                          .extents = targets->extents,
                                          .extents_count = targets->count,
                                          .staging = staging,
                                          .stream = stream,
                                          .options = &options,
                                          .patience = &patience};
    struct stx_owned_way way;
    return stx_transfer_run(&transfer, result, &way, error);
}

/* All slots can be had, and are given back. */
static void check_ring(struct stx_staging *staging) {
    char *slots[RING_BYTES / STX_STAGING_SLOT_BYTES], *more;
    struct stx_device *const device = stx_staging_device(staging);
    const size_t count = sizeof slots / sizeof slots[0];
    int before;
    CHECK(device->ops->enter(device, &before, &err) == STX_OK);
    for (size_t i = 0; i < count; i++)
        CHECK(stx_staging_take(staging, 0, &slots[i], &err) == STX_OK && slots[i] != NULL);
    CHECK(stx_staging_take(staging, 1, &more, &err) == STX_OK && more == NULL);
    for (size_t i = 0; i < count; i++) stx_staging_give_back(staging, slots[i]);
    device->ops->leave(device, before);
}

static void run(struct stx_staging *staging, const struct targets *targets) {
    struct stx_load_result result;
    CHECK(run_on(staging, targets, NULL, NULL, &result, &err) == STX_OK && !result.cancelled);
    check_whole(targets);
}

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
    CHECK(stx_device_cuda() == NULL); /* no runtime is loaded for its own sake */
    bind_fake();
    make_folder(folder);
    make_scratch(&scratch, folder, "file", 24 * MIB + 777, 3);
    CHECK(stx_file_open(&file, scratch.path, &err) == STX_OK);
    test_sizes();
    test_nothing();
    test_order();
    test_every_failure();
    test_not_pinned();
    test_device_that_is_gone();
    test_cancelling();
    test_a_file_that_was_cut();
    test_loads_at_a_time();
    test_cpu();
    stx_file_close(&file);
    remove_scratch(&scratch);
    CHECK(rmdir(folder) == 0);
    return 0;
}
