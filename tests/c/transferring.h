/* SPDX-License-Identifier: Apache-2.0
 *
 * A file, a device whose copies happen late (fake_cudart.c, whose path is in STX_FAKE_CUDART), and
 * transfers from the one to memory of the other, whose every byte is looked at.
 */
#ifndef STX_TEST_TRANSFERRING_H
#define STX_TEST_TRANSFERRING_H

#include <dlfcn.h>

#include "scratch.h"
#include "transfer.h"

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

static inline void bind_fake(void) {
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
static inline void set_faults(const char *fail, const char *fail_all, const char *delay_us) {
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

static inline void add(struct targets *targets, uint64_t begin, uint64_t size) {
    CHECK(targets->count < EXTENTS_MAX && begin + size <= scratch.size_bytes);
    char *const memory = malloc((size_t)size);
    CHECK(memory != NULL);
    memset(memory, 0x11, (size_t)size);
    targets->extents[targets->count++] = (struct stx_extent){
        .begin_bytes = begin, .end_bytes = begin + size, .target = (uint64_t)(uintptr_t)memory};
}

/* Runs of bytes up to `most` long, `apart` from each other at most, over the whole file. */
static inline struct targets *make_some(uint64_t most, uint64_t apart, uint64_t seed,
                                        size_t limit) {
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

static inline struct targets *make_targets(uint64_t most, uint64_t apart, uint64_t seed) {
    return make_some(most, apart, seed, EXTENTS_MAX);
}

static inline bool is_whole(const struct stx_extent *extent) {
    return memcmp((const void *)(uintptr_t)extent->target, scratch.bytes + extent->begin_bytes,
                  (size_t)(extent->end_bytes - extent->begin_bytes)) == 0;
}

static inline void check_whole(const struct targets *targets) {
    for (size_t i = 0; i < targets->count; i++) CHECK(is_whole(&targets->extents[i]));
}

static inline void free_targets(struct targets *targets) {
    for (size_t i = 0; i < targets->count; i++) free((void *)(uintptr_t)targets->extents[i].target);
    free(targets);
}

/* --- runs --- */

static inline bool go_on(void *context) {
    uint32_t *const left = context;
    if (left == NULL) return true;
    if (*left == 0) return false;
    --*left;
    return true;
}

static inline struct stx_staging *open_ring(void) {
    struct stx_staging *staging = NULL;
    const struct stx_device device = {.ops = cuda, .index = 1};
    CHECK(stx_staging_open(&staging, &device, RING_BYTES, &err) == STX_OK);
    return staging;
}

static inline enum stx_status run_on(struct stx_staging *staging, const struct targets *targets,
                                     void *stream, uint32_t *patience_left,
                                     struct stx_load_result *result, struct stx_err *error) {
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
static inline void check_ring(struct stx_staging *staging) {
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

static inline void run(struct stx_staging *staging, const struct targets *targets) {
    struct stx_load_result result;
    CHECK(run_on(staging, targets, NULL, NULL, &result, &err) == STX_OK && !result.cancelled);
    check_whole(targets);
}

static inline void open_world(char folder[PATH_MAX]) {
    CHECK(stx_device_cuda() == NULL); /* no runtime is loaded for its own sake */
    bind_fake();
    make_folder(folder);
    make_scratch(&scratch, folder, "file", 24 * MIB + 777, 3);
    CHECK(stx_file_open(&file, scratch.path, &err) == STX_OK);
}

static inline void close_world(const char *folder) {
    stx_file_close(&file);
    remove_scratch(&scratch);
    CHECK(rmdir(folder) == 0);
}

#endif
