/* SPDX-License-Identifier: Apache-2.0
 *
 * Files by plain system calls. Guarantee: every descriptor opened here is close-on-exec and no
 * call returns half a read. Does not know what is in the file.
 */
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "checked.h"
#include "trace.h"

#ifndef SYS_cachestat
#define SYS_cachestat 451 /* the same number on every architecture; Linux 6.5 */
#endif

#define DIRECT_BYTES 4096 /* what direct reads are aligned to everywhere we know */

/* One pread moves less than 2 GiB on Linux. */
#define READ_BYTES_MAX (UINT64_C(1) << 30)

static int ask_cached(int fd, uint64_t begin_bytes, uint64_t size_bytes, uint64_t *cached_pages) {
    /* struct cachestat_range and struct cachestat of linux/mman.h, which old headers lack. */
    struct {
        uint64_t offset, length;
    } range = {begin_bytes, size_bytes}; /* length 0: to the end */
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } pages = {0, 0, 0, 0, 0};
    const int result = (int)syscall(SYS_cachestat, fd, &range, &pages, 0u);
    *cached_pages = pages.cached;
    return result;
}

/* mincore's own rule: those who own a file or may write to it are told; the others hear that all of
 * it is there. */
static bool is_told(const char *path, const struct stat *status) {
    return status->st_uid == geteuid() || faccessat(AT_FDCWD, path, W_OK, AT_EACCESS) == 0;
}

enum stx_status stx_file_open(struct stx_file *file, const char *path, struct stx_err *err) {
    struct stat status;
    *file = (struct stx_file){.fd = -1};
    /* Looked at before it is opened: a pipe's writer would notice, and a device might act. */
    if (stat(path, &status) != 0) return stx_err_set_errno(err, errno, "stat");
    if (!S_ISREG(status.st_mode))
        return stx_err_set(err, STX_ERR_UNSUPPORTED, "not a regular file");
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return stx_err_set_errno(err, errno, "open");
    if (fstat(fd, &status) != 0) {
        (void)stx_err_set_errno(err, errno, "fstat");
        (void)close(fd);
        return err->status;
    }
    if (!S_ISREG(status.st_mode)) {
        (void)close(fd);
        return stx_err_set(err, STX_ERR_UNSUPPORTED, "not a regular file");
    }
    file->fd = fd;
    file->label = stx_trace_label(path);
    file->residency_is_told = is_told(path, &status);
    file->identity = (struct stx_file_identity){
        .device = (uint64_t)status.st_dev,
        .inode = (uint64_t)status.st_ino,
        .size_bytes = (uint64_t)status.st_size,
        .mtime_ns = (int64_t)status.st_mtim.tv_sec * 1000000000 + status.st_mtim.tv_nsec};
    return STX_OK;
}

void stx_file_close(struct stx_file *file) {
    if (file->fd >= 0) (void)close(file->fd);
    file->fd = -1;
}

enum stx_status stx_file_read(const struct stx_file *file, void *buffer, uint64_t size_bytes,
                              uint64_t offset_bytes, struct stx_err *err) {
    char *target = buffer;
    while (size_bytes != 0) {
        const ssize_t got = pread(file->fd, target, (size_t)stx_min_u64(size_bytes, READ_BYTES_MAX),
                                  (off_t)offset_bytes);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return stx_err_set_errno(err, errno, "pread");
        if (got == 0)
            return stx_err_set(err, STX_ERR_IO, "file truncated at byte %llu",
                               (unsigned long long)offset_bytes);
        target += got;
        offset_bytes += (uint64_t)got;
        size_bytes -= (uint64_t)got;
    }
    return STX_OK;
}

void stx_file_expect_sequential(const struct stx_file *file) {
    (void)posix_fadvise(file->fd, 0, 0, POSIX_FADV_SEQUENTIAL);
}

void stx_file_expect_random(const struct stx_file *file) {
    (void)posix_fadvise(file->fd, 0, 0, POSIX_FADV_RANDOM);
}

int stx_file_open_direct(const struct stx_file *file) {
    char path[64];
    void *block = NULL;
    (void)snprintf(path, sizeof path, "/proc/self/fd/%d", file->fd);
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
    if (fd < 0) return -1;
    const bool proven = posix_memalign(&block, DIRECT_BYTES, DIRECT_BYTES) == 0 &&
                        pread(fd, block, DIRECT_BYTES, 0) > 0;
    free(block);
    if (proven) return fd;
    (void)close(fd);
    return -1;
}

bool stx_file_is_remote(const struct stx_file *file) {
    struct statfs status;
    if (fstatfs(file->fd, &status) != 0) return false;
    switch ((uint32_t)status.f_type) {
        case UINT32_C(0x6969):     /* NFS */
        case UINT32_C(0xFF534D42): /* CIFS */
        case UINT32_C(0xFE534D42): /* SMB 2 */
        case UINT32_C(0x65735546): /* FUSE */
        case UINT32_C(0x0BD00BD0): /* Lustre */
        case UINT32_C(0x00C36400): /* Ceph */
        case UINT32_C(0x01021997): /* 9p */
        case UINT32_C(0x47504653): /* GPFS */
            return true;
        default:
            return false;
    }
}

enum stx_status stx_file_cached_range(const struct stx_file *file, uint64_t begin_bytes,
                                      uint64_t end_bytes, uint64_t *cached_bytes,
                                      struct stx_err *err) {
    uint64_t cached_pages;
    if (ask_cached(file->fd, begin_bytes, end_bytes - begin_bytes, &cached_pages) != 0)
        return stx_err_set(err, STX_ERR_UNSUPPORTED, "page cache residency is not told");
    *cached_bytes = cached_pages * (uint64_t)sysconf(_SC_PAGESIZE);
    return STX_OK;
}

enum stx_status stx_file_cached_bytes(const struct stx_file *file, uint64_t *cached_bytes,
                                      struct stx_err *err) {
    return stx_file_cached_range(file, 0, 0, cached_bytes, err); /* 0: to the end */
}
