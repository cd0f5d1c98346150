/* SPDX-License-Identifier: Apache-2.0
 *
 * Description: both engines read what is in a file, through the page cache and past it, at any
 * offset and depth; they tell errors and ends as the kernel does; close waits for what was begun;
 * and where io_uring is forbidden the threads take over and say why.
 */
#include "engine.h"

#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>

#include "scratch.h"

#define FILE_BYTES ((size_t)3 * 1000 * 1000 + 123)

static struct stx_err err;
static struct scratch file;
static uint64_t seed = 12345;

static bool open_engine(struct stx_engine *engine, enum stx_engine_kind kind, uint32_t depth,
                        uint32_t threads_count) {
    const struct stx_engine_options options = {kind, depth, threads_count};
    const enum stx_status status = stx_engine_open(engine, &options, &err);
    if (status == STX_OK) return true;
    CHECK(status == STX_ERR_UNSUPPORTED && kind == STX_ENGINE_URING && engine->ops == NULL);
    CHECK(stx_engine_refusal() != NULL && strcmp(err.message, stx_engine_refusal()) == 0);
    return false;
}

static uint32_t reap_some(struct stx_engine *engine, struct stx_io_done done[]) {
    uint32_t count = 0;
    while (count == 0)
        CHECK(stx_engine_reap(engine, done, STX_ENGINE_DEPTH_MAX, 1000, &count, &err) == STX_OK);
    return count;
}

/* One read, alone. */
static int32_t read_one(struct stx_engine *engine, int fd, void *buffer, uint64_t offset_bytes,
                        uint32_t size_bytes) {
    struct stx_io_done done[STX_ENGINE_DEPTH_MAX];
    const struct stx_io io = {fd, fd != file.direct_fd, buffer, offset_bytes, size_bytes, 7};
    CHECK(stx_engine_submit(engine, &io, &err) == STX_OK);
    CHECK(reap_some(engine, done) == 1 && done[0].tag == 7 && engine->outstanding == 0);
    return done[0].result;
}

static int32_t expected_bytes(const struct stx_io *io) {
    if (io->offset_bytes >= FILE_BYTES) return 0;
    const uint64_t left = FILE_BYTES - io->offset_bytes;
    return (int32_t)(left < io->size_bytes ? left : io->size_bytes);
}

static struct stx_io random_io(bool direct) {
    struct stx_io io = {.fd = file.fd, .buffered = true};
    io.offset_bytes = random_below(&seed, FILE_BYTES + 100);
    io.size_bytes = (uint32_t)(1 + random_below(&seed, 90000));
    if (!direct) return io;
    io.fd = file.direct_fd;
    io.buffered = false;
    io.offset_bytes = io.offset_bytes / 4096 * 4096;
    io.size_bytes = (io.size_bytes + 4095) / 4096 * 4096;
    return io;
}

/* Many reads, as many at a time as the depth allows, every one checked. */
static void test_reading(enum stx_engine_kind kind, uint32_t depth, uint32_t threads, bool direct) {
    struct stx_engine engine;
    struct stx_io_done done[STX_ENGINE_DEPTH_MAX];
    struct stx_io ios[STX_ENGINE_DEPTH_MAX];
    uint32_t spare[STX_ENGINE_DEPTH_MAX], spare_count = 0, begun = 0, ended = 0;
    if (!open_engine(&engine, kind, depth, threads)) return;
    for (uint32_t i = 0; i < engine.depth; i++) spare[spare_count++] = i;
    while (ended < 300) {
        while (begun < 300 && spare_count != 0) {
            const uint32_t slot = spare[--spare_count];
            ios[slot] = random_io(direct);
            ios[slot].tag = slot;
            ios[slot].buffer = allocate_aligned(ios[slot].size_bytes);
            CHECK(stx_engine_submit(&engine, &ios[slot], &err) == STX_OK);
            begun++;
        }
        const uint32_t count = reap_some(&engine, done);
        for (uint32_t i = 0; i < count; i++) {
            const struct stx_io *io = &ios[done[i].tag];
            CHECK(done[i].result == expected_bytes(io));
            if (done[i].result != 0)
                CHECK(memcmp(io->buffer, file.bytes + io->offset_bytes, (size_t)done[i].result) ==
                      0);
            free(io->buffer);
            spare[spare_count++] = done[i].tag;
        }
        ended += count;
    }
    CHECK(engine.outstanding == 0 && begun == ended);
    stx_engine_close(&engine);
    CHECK(engine.ops == NULL);
    stx_engine_close(&engine);
}

static void test_answers(enum stx_engine_kind kind) {
    struct stx_engine engine;
    char buffer[64];
    if (!open_engine(&engine, kind, 1, 1)) return;
    const int folder = open("/", O_RDONLY | O_CLOEXEC);
    CHECK(folder >= 0);
    CHECK(read_one(&engine, file.fd, buffer, FILE_BYTES - 10, 64) == 10);
    CHECK(read_one(&engine, file.fd, buffer, FILE_BYTES, 64) == 0);
    CHECK(read_one(&engine, file.fd, buffer, FILE_BYTES * 2, 64) == 0);
    CHECK(read_one(&engine, -1, buffer, 0, 64) == -EBADF);
    CHECK(read_one(&engine, folder, buffer, 0, 64) == -EISDIR);
    if (file.direct_fd >= 0) {
        const int32_t result = read_one(&engine, file.direct_fd, buffer + 1, 1, 63);
        CHECK(result == -EINVAL || result == 63); /* some file systems take anything */
    }
    CHECK(close(folder) == 0);
    stx_engine_close(&engine);
}

/* After close nothing is written any more, although nothing was reaped. */
static void test_closing(enum stx_engine_kind kind, uint32_t threads, bool direct) {
    struct stx_engine engine;
    const size_t size_bytes = 65536;
    unsigned char *memory = allocate_aligned(size_bytes * STX_ENGINE_DEPTH_MAX);
    unsigned char *after = malloc(size_bytes * STX_ENGINE_DEPTH_MAX);
    CHECK(after != NULL);
    memset(memory, 0xA5, size_bytes * STX_ENGINE_DEPTH_MAX);
    if (open_engine(&engine, kind, 0, threads)) {
        for (uint32_t i = 0; i < STX_ENGINE_DEPTH_MAX; i++) {
            const struct stx_io io = {direct ? file.direct_fd : file.fd,
                                      !direct,
                                      memory + i * size_bytes,
                                      (i % 40) * size_bytes,
                                      (uint32_t)size_bytes,
                                      i};
            CHECK(stx_engine_submit(&engine, &io, &err) == STX_OK);
        }
        stx_engine_close(&engine);
        memcpy(after, memory, size_bytes * STX_ENGINE_DEPTH_MAX);
        (void)nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
        CHECK(memcmp(after, memory, size_bytes * STX_ENGINE_DEPTH_MAX) == 0);
    }
    free(after);
    free(memory);
}

static uint64_t now_ms(void) {
    struct timespec now;
    CHECK(clock_gettime(CLOCK_MONOTONIC, &now) == 0);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static volatile sig_atomic_t handled_by;

static void note_thread(int signal_number) {
    (void)signal_number;
    handled_by = (sig_atomic_t)syscall(SYS_gettid);
}

static void *write_later(void *fd) {
    (void)nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    return write(*(int *)fd, "later", 5) == 5 ? fd : NULL;
}

/* A pipe keeps a ring's read waiting for as long as it takes. */
static void test_waiting_in_the_ring(void) {
    struct stx_engine engine;
    struct stx_io_done done[1];
    int ends[2];
    char buffer[8] = "";
    uint32_t count = 9;
    pthread_t writer;
    void *written = NULL;
    if (!open_engine(&engine, STX_ENGINE_URING, 2, 0)) return;
    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    const struct stx_io io = {ends[0], true, buffer, UINT64_MAX, 5, 3};
    CHECK(stx_engine_submit(&engine, &io, &err) == STX_OK);
    const uint64_t start = now_ms();
    CHECK(stx_engine_reap(&engine, done, 1, 30, &count, &err) == STX_OK && count == 0);
    CHECK(now_ms() - start >= 29 && engine.outstanding == 1);
    CHECK(stx_engine_reap(&engine, done, 1, 0, &count, &err) == STX_OK && count == 0);

    /* A signal ends the wait, too. */
    const struct itimerval soon = {.it_value = {.tv_usec = 30000}};
    CHECK(setitimer(ITIMER_REAL, &soon, NULL) == 0);
    CHECK(stx_engine_reap(&engine, done, 1, 60000, &count, &err) == STX_OK && count == 0);
    CHECK(now_ms() - start < 30000);

    CHECK(pthread_create(&writer, NULL, write_later, &ends[1]) == 0);
    stx_engine_close(&engine);
    CHECK(memcmp(buffer, "later", 5) == 0);
    CHECK(pthread_join(writer, &written) == 0 && written != NULL);
    CHECK(close(ends[0]) == 0 && close(ends[1]) == 0);
}

/* The pool's threads leave signals to the program's own. */
static void test_signals(void) {
    struct stx_engine engine;
    char buffer[16];
    CHECK(open_engine(&engine, STX_ENGINE_THREADS, 4, 4));
    CHECK(read_one(&engine, file.fd, buffer, 5, 16) == 16);
    const int threads_with_pool = count_entries("/proc/self/task");
    const uint64_t start = now_ms();
    sigset_t alarm_only, before;
    CHECK(sigemptyset(&alarm_only) == 0 && sigaddset(&alarm_only, SIGALRM) == 0);
    CHECK(pthread_sigmask(SIG_BLOCK, &alarm_only, &before) == 0);
    handled_by = 0;
    CHECK(kill(getpid(), SIGALRM) == 0); /* a thread that takes signals would take it now */
    for (int i = 0; i < 20; i++) CHECK(read_one(&engine, file.fd, buffer, 5, 16) == 16);
    CHECK(handled_by == 0);
    CHECK(pthread_sigmask(SIG_SETMASK, &before, NULL) == 0); /* comes before this returns */
    CHECK(handled_by == (sig_atomic_t)syscall(SYS_gettid));
    stx_engine_close(&engine);
    /* A joined thread may be listed for a moment longer. */
    while (count_entries("/proc/self/task") >= threads_with_pool) CHECK(now_ms() - start < 10000);
}

static void forbid(long system_call, int sys_errno) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)system_call, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)sys_errno),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    const struct sock_fprog program = {sizeof filter / sizeof filter[0], filter};
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
}

static void live_without_ring(const char *expected) {
    struct stx_engine engine;
    char buffer[16];
    const struct stx_engine_options ring_only = {STX_ENGINE_URING, 0, 0};
    CHECK(open_engine(&engine, STX_ENGINE_AUTO, 0, 2) && engine.ops == &stx_engine_threads);
    CHECK(stx_engine_refusal() != NULL && strcmp(stx_engine_refusal(), expected) == 0);
    CHECK(read_one(&engine, file.fd, buffer, 1000, 16) == 16);
    CHECK(memcmp(buffer, file.bytes + 1000, 16) == 0);
    stx_engine_close(&engine);
    for (int i = 0; i < 2; i++) {
        CHECK(stx_engine_open(&engine, &ring_only, &err) == STX_ERR_UNSUPPORTED);
        CHECK(strcmp(err.message, expected) == 0 && engine.ops == NULL);
    }
}

/* In a child, since a filter stays for life. */
static void test_forbidden(long system_call, int sys_errno, const char *expected) {
    int status;
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        forbid(system_call, sys_errno);
        live_without_ring(expected);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void test_forbidding(void) {
    struct stx_engine engine;
    if (stx_engine_refusal() != NULL) return; /* a build without it */
    test_forbidden(SYS_io_uring_setup, EPERM, "io_uring: Operation not permitted");
    test_forbidden(SYS_io_uring_setup, ENOSYS, "io_uring: Function not implemented");
    test_forbidden(SYS_io_uring_setup, ENOMEM, "io_uring: Cannot allocate memory");
    test_forbidden(SYS_io_uring_setup, EACCES, "io_uring: Permission denied");
    if (!open_engine(&engine, STX_ENGINE_URING, 0, 0)) return;
    stx_engine_close(&engine);
    test_forbidden(SYS_io_uring_enter, EPERM, "io_uring: Operation not permitted");
    CHECK(open_engine(&engine, STX_ENGINE_AUTO, 0, 0) && engine.ops == &stx_engine_uring);
    CHECK(stx_engine_refusal() == NULL);
    stx_engine_close(&engine);
}

int main(void) {
    const enum stx_engine_kind kinds[] = {STX_ENGINE_URING, STX_ENGINE_THREADS, STX_ENGINE_AUTO};
    const struct sigaction action = {.sa_handler = note_thread};
    char folder[PATH_MAX];
    make_folder(folder);
    make_scratch(&file, folder, "file", FILE_BYTES, 1);
    CHECK(sigaction(SIGALRM, &action, NULL) == 0);
    const int descriptors = count_entries("/proc/self/fd");
    test_forbidding(); /* first, while this process has one thread */
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        for (int direct = 0; direct <= (file.direct_fd >= 0 ? 1 : 0); direct++) {
            test_reading(kinds[i], 1, 1, direct == 1);
            test_reading(kinds[i], 7, 3, direct == 1);
            test_reading(kinds[i], 64, 0, direct == 1);
            test_reading(kinds[i], 0, 1000, direct == 1);
            test_closing(kinds[i], 0, direct == 1);
            test_closing(kinds[i], 1, direct == 1);
        }
        test_answers(kinds[i]);
    }
    test_waiting_in_the_ring();
    test_signals();
    CHECK(count_entries("/proc/self/fd") == descriptors);
    remove_scratch(&file);
    CHECK(rmdir(folder) == 0);
    return 0;
}
