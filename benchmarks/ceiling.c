// SPDX-License-Identifier: Apache-2.0
// What the disk gives at best: direct reads of whole files by some threads, block by block, into
// memory of the full size that was touched before (huge pages where the system has them).
//
//   ceiling THREADS BLOCK_BYTES FILE...           prints JSON: seconds and bytes
//   ceiling cached THREADS BLOCK_BYTES FILE...    the same of what the page cache gives
//
// The files have to be out of the page cache, or in it. Memory is page-aligned, as are offsets and lengths;
// the last block of a file is asked for beyond its end and comes back short.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FILES = 64, MAX_THREADS = 64 };

typedef struct {
    int descriptor;
    size_t size;
    size_t first_block; // in the numbering over all files
    char *destination;
} file_t;

static file_t files[MAX_FILES];
static int file_count;
static size_t block_bytes, block_count;
static atomic_size_t next_block;

static void stop(const char *what, const char *name) {
    fprintf(stderr, "ceiling: %s %s: %s\n", what, name, strerror(errno));
    exit(1);
}

static void *read_blocks(void *unused) {
    (void)unused;
    for (;;) {
        size_t block = atomic_fetch_add(&next_block, 1);
        if (block >= block_count) {
            return NULL;
        }
        int number = file_count - 1;
        while (files[number].first_block > block) {
            number--;
        }
        const file_t *file = &files[number];
        size_t offset = (block - file->first_block) * block_bytes;
        size_t wanted = file->size - offset < block_bytes ? file->size - offset : block_bytes;
        size_t done = 0;
        while (done < wanted) {
            ssize_t got = pread(file->descriptor, file->destination + offset + done,
                                block_bytes - done, (off_t)(offset + done));
            if (got <= 0) {
                stop("read", "failed");
            }
            done += (size_t)got;
        }
    }
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

int main(int argc, char **argv) {
    int how = O_RDONLY | O_DIRECT;
    if (argc > 1 && strcmp(argv[1], "cached") == 0) {
        how = O_RDONLY;
        argc--;
        argv++;
    }
    if (argc < 4 || argc - 3 > MAX_FILES) {
        fprintf(stderr, "usage: ceiling [cached] THREADS BLOCK_BYTES FILE...\n");
        return 2;
    }
    int thread_count = atoi(argv[1]);
    block_bytes = (size_t)atoll(argv[2]);
    if (thread_count < 1 || thread_count > MAX_THREADS || block_bytes % 4096 != 0) {
        fprintf(stderr, "ceiling: 1 to %d threads, blocks a multiple of 4096\n", MAX_THREADS);
        return 2;
    }
    file_count = argc - 3;
    size_t total = 0;
    for (int i = 0; i < file_count; i++) {
        struct stat status;
        file_t *file = &files[i];
        file->descriptor = open(argv[3 + i], how);
        if (file->descriptor < 0 || fstat(file->descriptor, &status) != 0) {
            stop("open", argv[3 + i]);
        }
        file->size = (size_t)status.st_size;
        file->first_block = block_count;
        block_count += (file->size + block_bytes - 1) / block_bytes;
        total += file->size;
    }
    size_t huge = (size_t)2 << 20, mapped = block_count * block_bytes + huge;
    char *memory = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        stop("mmap", "failed");
    }
    madvise(memory, mapped, MADV_HUGEPAGE); // small pages do, too
    memset(memory, 1, mapped);
    char *base = memory + (huge - (size_t)memory % huge) % huge;
    for (int i = 0; i < file_count; i++) {
        files[i].destination = base + files[i].first_block * block_bytes;
    }

    pthread_t threads[MAX_THREADS];
    double start = now();
    for (int i = 0; i < thread_count; i++) {
        if (pthread_create(&threads[i], NULL, read_blocks, NULL) != 0) {
            stop("pthread_create", "failed");
        }
    }
    for (int i = 0; i < thread_count; i++) {
        pthread_join(threads[i], NULL);
    }
    printf("{\"return_s\": %.9f, \"kept_bytes\": %zu}\n", now() - start, total);
    return 0;
}
