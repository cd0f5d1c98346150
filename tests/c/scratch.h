/* SPDX-License-Identifier: Apache-2.0
 *
 * Files of random bytes in a folder of their own, opened for buffered and for direct reads.
 */
#ifndef STX_TEST_SCRATCH_H
#define STX_TEST_SCRATCH_H

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

#include "check.h"

struct scratch {
    char path[PATH_MAX];
    unsigned char *bytes; /* what is in the file */
    size_t size_bytes;
    int fd;
    int direct_fd; /* -1: the file system refuses direct reads */
};

static inline void make_folder(char folder[PATH_MAX]) {
    const char *parent = getenv("TMPDIR");
    if (parent == NULL || parent[0] == '\0') parent = "/tmp";
    CHECK(snprintf(folder, PATH_MAX, "%s/stx-test-XXXXXX", parent) < PATH_MAX);
    CHECK(mkdtemp(folder) != NULL);
}

static inline void *allocate_aligned(size_t size_bytes) {
    void *memory = NULL;
    CHECK(posix_memalign(&memory, 4096, (size_bytes + 4095) / 4096 * 4096 + 4096) == 0);
    return memory;
}

/* A direct descriptor that has read something, or -1. */
static inline int open_direct(const char *path) {
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
    if (fd < 0) return -1;
    void *memory = allocate_aligned(4096);
    const bool works = pread(fd, memory, 4096, 0) > 0;
    free(memory);
    if (works) return fd;
    CHECK(close(fd) == 0);
    return -1;
}

static inline void make_scratch(struct scratch *scratch, const char *folder, const char *name,
                                size_t size_bytes, uint64_t seed) {
    CHECK(snprintf(scratch->path, PATH_MAX, "%s/%s", folder, name) < PATH_MAX);
    scratch->size_bytes = size_bytes;
    scratch->bytes = malloc(size_bytes + 1);
    CHECK(scratch->bytes != NULL);
    for (size_t i = 0; i < size_bytes; i++) scratch->bytes[i] = (unsigned char)next_random(&seed);
    FILE *file = fopen(scratch->path, "wb");
    CHECK(file != NULL && fwrite(scratch->bytes, 1, size_bytes, file) == size_bytes);
    CHECK(fflush(file) == 0 && fsync(fileno(file)) == 0 && fclose(file) == 0);
    scratch->fd = open(scratch->path, O_RDONLY | O_CLOEXEC);
    CHECK(scratch->fd >= 0);
    scratch->direct_fd = open_direct(scratch->path);
}

static inline void remove_scratch(struct scratch *scratch) {
    if (scratch->direct_fd >= 0) CHECK(close(scratch->direct_fd) == 0);
    CHECK(close(scratch->fd) == 0 && unlink(scratch->path) == 0);
    free(scratch->bytes);
}

static inline int count_entries(const char *path) {
    int count = 0;
    DIR *folder = opendir(path);
    CHECK(folder != NULL);
    while (readdir(folder) != NULL) count++;
    CHECK(closedir(folder) == 0);
    return count;
}

#endif
